use super::*;

pub(super) fn options(threads: usize) -> BuildOptions {
    BuildOptions {
        threads: NonZeroUsize::new(threads).unwrap(),
        ..BuildOptions::default()
    }
}

pub(super) fn convert(tar: &[u8], options: &BuildOptions) -> (Vec<u8>, BuiltLayer) {
    let mut blob = Vec::new();
    let built = build(tar, &mut blob, options).unwrap();
    (blob, built)
}

pub(super) fn gunzip(blob: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    crate::input::decompress(blob).unwrap().read_to_end(&mut out).unwrap();
    out
}

/// Runs GNU tar on an archive; fails on anything it complains about.
pub(super) fn gnu_tar(args: &[&str], archive: &[u8]) -> String {
    let mut child = Command::new("tar")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let archive = archive.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&archive));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
