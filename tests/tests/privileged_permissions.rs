//! What files let programs do: setuid and setgid programs, file capabilities, extended attributes and ACLs are on lazy
//! layers what they are on containerd's own overlayfs with the same image.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use hullspeed_tests::layer_tar;
use hullspeed_tests::layout::{ImageConfig, LayoutImage, LayoutWriter};
use hullspeed_tests::process::output;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::scenario::{CONVERTED, Node, Scenario};
use hullspeed_tests::snapshots::chain_id;
use rustix::fs::{XattrFlags, setxattr};

const TAG: &str = "permissions";

/// Somebody with an entry of his own in the ACLs.
const NAMED: u32 = 1000;
/// A group with an entry of its own.
const NAMED_GROUP: u32 = 2000;
/// Somebody of whom nothing is said.
const OTHER: u32 = 3000;

/// `cap_net_bind_service` and `cap_net_raw`, permitted and effective, of the second revision.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Entries of an ACL.
#[derive(Clone, Copy)]
enum Entry {
    Owner(u16),
    User(u32, u16),
    Group(u16),
    NamedGroup(u32, u16),
    Mask(u16),
    Others(u16),
}

/// As the kernel has it in an extended attribute.
fn acl(entries: &[Entry]) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for entry in entries {
        let (tag, permissions, id) = match *entry {
            Entry::Owner(permissions) => (0x01_u16, permissions, NOBODY),
            Entry::User(id, permissions) => (0x02, permissions, id),
            Entry::Group(permissions) => (0x04, permissions, NOBODY),
            Entry::NamedGroup(id, permissions) => (0x08, permissions, id),
            Entry::Mask(permissions) => (0x10, permissions, NOBODY),
            Entry::Others(permissions) => (0x20, permissions, NOBODY),
        };
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn set(path: &Path, name: &str, value: &[u8]) {
    setxattr(path, name, value, XattrFlags::empty()).unwrap();
}

struct Tree {
    root: PathBuf,
    /// The program that the others are copies of.
    identity: PathBuf,
}

impl Tree {
    fn program(&self, name: &str, mode: u32, (user, group): (u32, u32)) {
        let path = self.root.join("bin").join(name);
        fs::copy(&self.identity, &path).unwrap();
        // A change of the owner takes the bits away.
        chown(&path, Some(user), Some(group)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn file(&self, name: &str, mode: u32, attributes: &[(&str, &[u8])]) {
        let path = self.root.join(name);
        fs::write(&path, name).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        attributes.iter().for_each(|(name, value)| set(&path, name, value));
    }

    fn directory(&self, name: &str, mode: u32, attributes: &[(&str, &[u8])]) {
        let path = self.root.join(name);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        attributes.iter().for_each(|(name, value)| set(&path, name, value));
    }
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

fn write_tree(root: PathBuf, identity: PathBuf) {
    let tree = Tree { root, identity };
    tree.directory("bin", 0o755, &[]);
    tree.program("identity", 0o755, (0, 0));
    tree.program("setuid-root", 0o4755, (0, 0));
    tree.program("setuid", 0o4755, (NAMED, 0));
    tree.program("setgid", 0o2755, (0, NAMED_GROUP));
    tree.program("both", 0o6755, (NAMED, NAMED_GROUP));
    tree.program("setuid-of-the-group", 0o4750, (0, NAMED_GROUP));
    tree.program("capable", 0o755, (0, 0));
    set(&tree.root.join("bin/capable"), "security.capability", &CAPABILITY);

    let named = acl(&[
        Entry::Owner(6),
        Entry::User(NAMED, 4),
        Entry::Group(0),
        Entry::Mask(4),
        Entry::Others(0),
    ]);
    let group = [
        Entry::Owner(6),
        Entry::Group(0),
        Entry::NamedGroup(NAMED_GROUP, 6),
        Entry::Mask(6),
        Entry::Others(0),
    ];
    let masked = [
        Entry::Owner(6),
        Entry::User(NAMED, 7),
        Entry::Group(0),
        Entry::Mask(2),
        Entry::Others(4),
    ];
    let refused = [
        Entry::Owner(6),
        Entry::User(NAMED, 0),
        Entry::Group(4),
        Entry::Mask(4),
        Entry::Others(4),
    ];
    let open = acl(&[
        Entry::Owner(7),
        Entry::User(NAMED, 7),
        Entry::Group(5),
        Entry::Mask(7),
        Entry::Others(5),
    ]);
    tree.file("private", 0o600, &[]);
    tree.file("acl-user", 0o640, &[(ACCESS, &named)]);
    tree.file("acl-group", 0o660, &[(ACCESS, &acl(&group))]);
    tree.file("acl-masked", 0o624, &[(ACCESS, &acl(&masked))]);
    tree.file("acl-refused", 0o644, &[(ACCESS, &acl(&refused))]);
    tree.file(
        "attributes",
        0o644,
        &[
            ("user.empty", b""),
            ("user.long", &[7; 900]),
            ("trusted.own", b"root's"),
        ],
    );
    let enter = [
        Entry::Owner(7),
        Entry::User(NAMED, 1),
        Entry::Group(0),
        Entry::Mask(1),
        Entry::Others(0),
    ];
    tree.directory("closed", 0o710, &[(ACCESS, &acl(&enter))]);
    tree.file("closed/inside", 0o644, &[]);
    tree.directory(
        "inherits",
        0o775,
        &[(ACCESS, &open), (DEFAULT, &open), ("user.of-a-directory", b"yes")],
    );
    tree.directory("group", 0o2775, &[]);
    chown(tree.root.join("group"), None, Some(NAMED_GROUP)).unwrap();
    tree.directory("group", 0o2777, &[]);
}

fn build(run: &RunDir) -> PathBuf {
    let (root, above) = (run.directory("root").unwrap(), run.directory("above").unwrap());
    let source = run.path().join("identity.c");
    fs::write(&source, include_str!("../programs/identity.c")).unwrap();
    let identity = run.path().join("identity");
    output(
        Command::new("cc")
            .args(["-static", "-O2", "-o"])
            .arg(&identity)
            .arg(&source),
    )
    .unwrap();
    write_tree(root.clone(), identity);
    fs::write(above.join("above"), "a layer above").unwrap();
    let layout = run.path().join(TAG);
    let mut writer = LayoutWriter::create(&layout).unwrap();
    for layer in [&root, &above] {
        layer_tar::clamp_times(layer, 0, 1_600_000_000).unwrap();
        writer.add_layer(|tar| layer_tar::write(layer, tar)).unwrap();
    }
    writer.finish(&ImageConfig::default(), TAG).unwrap();
    layout
}

/// What everybody may do in a container's root, a line for each thing.
async fn report(node: &mut Node, run: &RunDir, image: &LayoutImage, name: &str) -> String {
    let target = run.directory(&format!("container-{name}")).unwrap();
    let chain = chain_id(&image.diff_ids());
    let view = node.snapshots.container("container", &chain, &target).await.unwrap();
    let programs = [
        "identity",
        "setuid-root",
        "setuid",
        "setgid",
        "both",
        "setuid-of-the-group",
        "capable",
    ];
    let files = [
        "/private",
        "/acl-user",
        "/acl-group",
        "/acl-masked",
        "/acl-refused",
        "/closed/inside",
        "/closed",
        "/attributes",
    ];
    let attributed = [
        "/acl-user",
        "/acl-group",
        "/acl-masked",
        "/attributes",
        "/inherits",
        "/closed",
        "/bin/capable",
        "/bin/setuid",
        "/group",
    ];
    let mut said = String::new();
    let users = [(0, "0"), (NAMED, "1000"), (OTHER, "3000"), (OTHER, "3000,2000")];
    for (user, groups) in users {
        let mut ask = |arguments: &[&str]| {
            let mut command = Command::new(run.path().join("identity"));
            command
                .arg("as")
                .arg(view.path())
                .args([&user.to_string(), groups])
                .args(arguments);
            let done = command.output().unwrap();
            let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
            said += &format!("as {user} of {groups}: {arguments:?}: {}\n{text}", done.status);
        };
        for program in programs {
            ask(&[&format!("/bin/{program}"), "who"]);
        }
        let own = ["/bin/identity"];
        ask(&[&own[..], &["open"], &files].concat());
        ask(&[&own[..], &["xattrs"], &attributed].concat());
        ask(&[
            "/bin/identity",
            "make",
            if user == OTHER { "/group" } else { "/inherits" },
        ]);
        if user == OTHER {
            fs::remove_file(view.path().join("group/made-0")).unwrap();
            fs::remove_dir(view.path().join("group/made-1")).unwrap();
        } else {
            let _ = fs::remove_file(view.path().join("inherits/made-0"));
            let _ = fs::remove_dir(view.path().join("inherits/made-1"));
        }
    }
    node.snapshots.remove(view).await.unwrap();
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn files_let_programs_do_what_they_let_them_do_on_overlayfs() {
    let run = Scenario::prepare().unwrap();
    let layout = build(&run);
    let scenario = Scenario::with_image(run, &layout, TAG, &[]).await.unwrap();
    let mut plain = scenario.plain_node().await.unwrap();
    plain.cri.pull(&scenario.plain_reference()).await.unwrap();
    let expected = report(&mut plain, &scenario.run, &scenario.plain, "plain").await;
    let mut lazy = scenario.lazy_node("").await.unwrap();
    lazy.cri.pull(&scenario.reference(CONVERTED)).await.unwrap();
    lazy.check_lazy(&scenario.converted).unwrap();
    let seen = report(&mut lazy, &scenario.run, &scenario.converted, "lazy").await;
    for (expected, seen) in expected.lines().zip(seen.lines()) {
        assert_eq!(seen, expected);
    }
    assert_eq!(seen, expected);
    // What is compared is what this is about.
    for line in [
        "users 3000 0 0 groups 3000 3000 3000",
        "users 3000 1000 1000 groups 3000 2000 2000",
        "users 3000 3000 3000 groups 3000 3000 3000 effective 0000000000002400 permitted 0000000000002400",
        "/bin/setuid-of-the-group: not executed: Permission denied",
        "/acl-user: read yes, write Permission denied",
        "/acl-group: read yes, write yes",
        "/acl-masked: read Permission denied, write yes",
        "/acl-refused: read Permission denied, write Permission denied",
        "/closed/inside: read yes, write Permission denied",
        "/closed/inside: read Permission denied, write Permission denied",
        "/bin/capable: security.capability 0100000200240000",
        "/attributes: user.empty",
        "/inherits: system.posix_acl_default 02000000",
        "/inherits/made-1: 40775 0 0",
        "/group/made-1: 42755 3000 2000",
    ] {
        assert!(
            expected.contains(line),
            "overlayfs itself does not say {line:?}:\n{expected}"
        );
    }
}
