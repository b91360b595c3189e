//! Whole trees: one of everything, and whatever comes.

use std::collections::BTreeSet;

use estargz::toc::{EntryType, TocEntry};
use proptest::prelude::*;

use super::compare::{What, same_tree};
use super::layer::{INODES_AT, Layer, acl, changed, everything, set_xattr, small};
use super::*;

#[test]
fn privileged_one_of_everything_is_what_the_index_says() {
    let index = everything().index();
    let mounted = Mounted::new(&index);
    assert!(same_tree(&index, &mounted.root(), What::Mount) > 450);
    mounted.check();
}

#[test]
fn privileged_the_tools_of_the_format_read_the_same() {
    let index = everything().index();
    let mounted = Mounted::new(&index);
    let image = mounted.beside("erofs");
    let image = image.to_str().unwrap();
    let device = format!("--device={}", mounted.beside("data").display());
    let target = mounted.beside("extracted");
    run(
        "fsck.erofs",
        &[&device, &format!("--extract={}", target.display()), "--preserve", image],
    );
    same_tree(&index, &target, What::Extracted);

    let shown = run("dump.erofs", &["-s", &device, image]);
    assert!(
        shown.contains(&format!("inode count:                       {}\n", index.inode_count())),
        "{shown}"
    );
    assert!(shown.contains("chunked_file device_table"), "{shown}");
    let aligned = index
        .inode(index.lookup(index.lookup(1, b"bin").unwrap(), b"aligned").unwrap())
        .unwrap();
    let shown = run("dump.erofs", &["-e", "--path=/bin/aligned", &device, image]);
    let (from, to) = (aligned.data_offset, aligned.data_offset + 8192);
    let extent = format!("0..    8192 |    8192 : {from:>10}..{to:>10} |    8192  # device 1");
    assert!(from > 0 && shown.contains("Layout: 4"), "{shown}");
    assert!(shown.contains(&extent), "{extent:?} is not in {shown}");
}

fn xattrs(kind: EntryType) -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
    let plain = matches!(kind, EntryType::Dir | EntryType::Reg);
    let value = || prop_oneof![8 => prop::collection::vec(any::<u8>(), 0..40), 1 => prop::collection::vec(any::<u8>(), 300..9000)];
    let own = ("[a-z]{1,20}", value())
        .prop_map(move |(name, value)| (format!("{}.{name}", if plain { "user" } else { "security" }), value));
    let label = Just(("security.selinux".to_owned(), b"system_u:object_r:usr_t:s0".to_vec()));
    let access = Just(("system.posix_acl_access".to_owned(), acl(6, 7, 4, 4, 4, 0)));
    let attribute = if plain {
        prop_oneof![own, label, access].boxed()
    } else {
        prop_oneof![own, label].boxed()
    };
    prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(attribute, 1..6)]
}

fn entry() -> impl Strategy<Value = (TocEntry, u64)> {
    let kind = prop_oneof![
        4 => Just(EntryType::Dir), 6 => Just(EntryType::Reg), 2 => Just(EntryType::Symlink), 2 => Just(EntryType::Hardlink),
        1 => Just(EntryType::Fifo), 1 => Just(EntryType::Char), 1 => Just(EntryType::Block),
    ];
    let name = || prop_oneof![20 => "[a-c]{1,2}", 3 => "[ -.0-~]{1,60}", 1 => "[x-z]{255}"];
    let name = prop_oneof![20 => prop::collection::vec(name(), 1..4), 1 => prop::collection::vec(name(), 8..12)];
    let size = prop_oneof![1 => Just(0), 4 => 1..20_000u64, 1 => Just(4096u64), 1 => 60_000..200_000u64];
    let numbers = (
        any::<u32>(),
        any::<u32>(),
        0..4096u64,
        0..1_048_576u64,
        -3_000_000_000i64..9_000_000_000,
        0..1_000_000_000u32,
    );
    (kind, name, "[a-z/.]{1,50}", 1..80usize, 0..0o10000u64, size, numbers).prop_flat_map(
        |(kind, names, target, repeat, mode, size, (uid, gid, major, minor, seconds, nanoseconds))| {
            xattrs(kind).prop_map(move |xattrs| {
                let mut entry = TocEntry::new(names.join("/"), kind);
                entry.mode = mode;
                (entry.uid, entry.gid) = (uid.into(), gid.into());
                (entry.dev_major, entry.dev_minor) = (major, minor);
                entry.mod_time = rfc_3339(seconds, nanoseconds);
                if kind == EntryType::Symlink {
                    entry.link_name = target.repeat(repeat);
                }
                for (name, value) in xattrs {
                    set_xattr(&mut entry, &name, &value);
                }
                (entry, size)
            })
        },
    )
}

/// The time as text; the calendar by counting days.
fn rfc_3339(seconds: i64, nanoseconds: u32) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Counted from a 1st of March, leap days come last in their years and eras.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanoseconds:09}Z")
}

/// Leaves out what would make a TOC that has no index: entries in what is no directory, links to nothing.
fn sound(entries: Vec<(TocEntry, u64)>) -> Layer {
    let (mut layer, mut files, mut directories, mut taken) =
        (Layer::default(), Vec::<String>::new(), BTreeSet::new(), BTreeSet::new());
    for (mut entry, size) in entries {
        let name = entry.name.clone();
        let parents: Vec<String> = name.match_indices('/').map(|(at, _)| name[..at].to_owned()).collect();
        let odd = name
            .split('/')
            .any(|part| part.is_empty() || part == "." || part == ".." || part.starts_with(".wh."));
        if odd || parents.iter().any(|parent| taken.contains(parent)) || taken.contains(&name) {
            continue;
        }
        if directories.contains(&name) && entry.kind != EntryType::Dir {
            continue;
        }
        match entry.kind {
            EntryType::Hardlink if files.is_empty() => continue,
            EntryType::Hardlink => entry.link_name = files[name.len() % files.len()].clone(),
            EntryType::Reg => files.push(name.clone()),
            _ => {}
        }
        directories.extend(parents);
        if entry.kind == EntryType::Dir {
            directories.insert(name.clone());
        } else {
            taken.insert(name.clone());
        }
        if entry.kind == EntryType::Reg {
            layer.file(&name, size, |file| *file = TocEntry { size, ..entry });
        } else {
            layer.add(&name, entry.kind, |added| *added = entry);
        }
    }
    layer
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn privileged_any_tree_is_what_the_index_says(entries in prop::collection::vec(entry(), 0..120)) {
        let index = sound(entries).index();
        let mounted = Mounted::new(&index);
        same_tree(&index, &mounted.root(), What::Mount);
        mounted.check();
    }
}

/// An index with any one bit turned round is refused, gives no image, or an image of what it says.
#[test]
fn privileged_a_changed_index_is_mounted_as_it_says() {
    let sound = small().index_bytes();
    let mut mounts = 0;
    for at in INODES_AT..sound.len() {
        let bytes = changed(sound.clone(), |bytes| bytes[at] ^= 1 << (at % 8));
        let Ok(index) = LayerIndex::open(bytes) else { continue };
        if hullspeed_erofs::image(&index).is_err() {
            continue;
        }
        same_tree(&index, &Mounted::new(&index).root(), What::Mount);
        mounts += 1;
    }
    assert!(mounts > 100, "only {mounts} of {} opened", sound.len());
}
