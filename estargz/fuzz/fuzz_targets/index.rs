//! cargo fuzz run index
#![no_main]

#[path = "../probes.rs"]
#[allow(dead_code, reason = "each target uses one probe")]
mod probes;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    probes::seal_index(&mut bytes);
    probes::index(&bytes);
});
