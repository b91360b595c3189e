//! `workload`: does one thing to a file tree and prints how much it did in what time, as one JSON object. The figures run it as a
//! process of its own, so that what it costs to read is not mixed with what the measuring process does.

use std::process::ExitCode;

use clap::Parser;
use hullspeed_benches::native::workload::Workload;

/// One workload.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    workload: Workload,
}

fn main() -> ExitCode {
    let done = Cli::parse().workload.run().and_then(|done| {
        println!("{}", serde_json::to_string(&done)?);
        Ok(())
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
