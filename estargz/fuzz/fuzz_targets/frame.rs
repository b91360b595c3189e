//! cargo fuzz run frame
#![no_main]

#[path = "../probes.rs"]
#[allow(dead_code, reason = "each target uses one probe")]
mod probes;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    probes::frame(bytes);
});
