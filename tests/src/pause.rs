//! The pause image: a pod's first process, which holds its namespaces. No registry is at hand, so it is made here.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::layer_tar;
use crate::layout::{ImageConfig, LayoutWriter};

/// Waits for ever, reaps what it inherits, ends on SIGINT and SIGTERM.
const SOURCE: &str = r#"
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int signal) { (void)signal; _exit(0); }

static void reap(int signal) {
    (void)signal;
    while (waitpid(-1, 0, WNOHANG) > 0) {}
}

int main(void) {
    struct sigaction ends = {.sa_handler = end};
    struct sigaction reaps = {.sa_handler = reap, .sa_flags = SA_NOCLDSTOP};
    sigaction(SIGINT, &ends, 0);
    sigaction(SIGTERM, &ends, 0);
    sigaction(SIGCHLD, &reaps, 0);
    for (;;) pause();
}
"#;

/// Compiles the program, static, into `directory`; returns its path.
pub fn compile(directory: &Path) -> Result<PathBuf> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let source = directory.join("pause.c");
    fs::write(&source, SOURCE).with_context(|| format!("cannot write {}", source.display()))?;
    let program = directory.join("pause");
    crate::process::output(
        Command::new("cc")
            .args(["-static", "-Os", "-s", "-o"])
            .arg(&program)
            .arg(&source),
    )?;
    fs::remove_file(&source)?;
    Ok(program)
}

/// Writes the image, tagged `latest`, as a layout in `layout`, with `scratch` to work in.
pub fn build(layout: &Path, scratch: &Path) -> Result<()> {
    let root = scratch.join("pause-root");
    let program = compile(&root)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    layer_tar::clamp_times(&root, 0, 0)?;
    let mut writer = LayoutWriter::create(layout)?;
    writer.add_layer(|tar| layer_tar::write(&root, tar))?;
    let config = ImageConfig {
        entrypoint: vec!["/pause".into()],
        ..ImageConfig::default()
    };
    writer.finish(&config, "latest")?;
    fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))
}
