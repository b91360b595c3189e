//! Crashes, damage, mutations.

use proptest::prelude::*;

use super::*;

fn adopt(id: &str) -> AdoptRecord {
    AdoptRecord {
        id: id.into(),
        runtime_handler: "runc".into(),
        config: b"configuration".to_vec(),
        adopted_at: 1_700_000_000_000_000_000,
    }
}

fn any_record() -> impl Strategy<Value = Record> {
    let id = "[a-d]";
    prop_oneof![
        (id, proptest::collection::vec(any::<u8>(), 0..64), any::<i64>()).prop_map(|(id, config, adopted_at)| {
            let runtime_handler = String::new();
            Record::Adopt(AdoptRecord {
                id,
                runtime_handler,
                config,
                adopted_at,
            })
        }),
        id.prop_map(Record::Aborted),
        id.prop_map(Record::Whole),
        id.prop_map(Record::Branded),
        id.prop_map(Record::Forgotten),
    ]
}

fn journal_of(records: &[Record]) -> Vec<u8> {
    let mut bytes = codec::MAGIC.to_vec();
    records
        .iter()
        .for_each(|record| codec::encode(record, &mut bytes).unwrap());
    bytes
}

#[test]
fn what_was_appended_is_there_after_a_crash() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let journal = Journal::open(&path).unwrap();
    for id in ["a", "b", "c", "d", "w"] {
        journal.append(Record::Adopt(adopt(id))).unwrap();
    }
    journal.append(Record::Whole("w".into())).unwrap();
    journal.append(Record::Branded("a".into())).unwrap();
    journal.append(Record::Aborted("b".into())).unwrap();
    journal.append(Record::Forgotten("c".into())).unwrap();
    // A crash: the file is as it is, and the last record may be cut off.
    let mut bytes = std::fs::read(&path).unwrap();
    codec::encode(&Record::Adopt(adopt("e")), &mut bytes).unwrap();
    bytes.pop();
    std::fs::write(&path, bytes).unwrap();
    let again = Journal::open(&path).unwrap();
    assert!(
        again.is_lost() && journal.is_lost(),
        "one was cut off, one was not there"
    );
    let contents = again.contents();
    assert_eq!(contents, journal.contents());
    let states: Vec<_> = contents
        .adopted
        .iter()
        .map(|(id, entry)| (id.as_str(), entry.whole, entry.branded))
        .collect();
    assert_eq!(states, [("a", true, true), ("d", false, false), ("w", true, false)]);
    assert_eq!(contents.aborted, ["b"]);
    // What is appended after that is read, too.
    again.append(Record::Adopt(adopt("f"))).unwrap();
    let whole = Journal::open(&path).unwrap();
    assert!(whole.contents().adopted.contains_key("f") && !whole.is_lost());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn history_is_dropped_and_what_stands_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let journal = Journal::open(&path).unwrap();
    journal.append(Record::Adopt(adopt("stays"))).unwrap();
    let mut large = adopt("goes");
    large.config = vec![7; 100_000];
    for _ in 0..40 {
        journal.append(Record::Adopt(large.clone())).unwrap();
        journal.append(Record::Forgotten("goes".into())).unwrap();
        journal.compact().unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() < 2 * SLACK_BYTES);
    }
    assert_eq!(Journal::open(&path).unwrap().contents().adopted.len(), 1);
}

#[test]
fn a_failed_append_leaves_the_journal_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let journal = Journal::open(&path).unwrap();
    let mut huge = adopt("huge");
    huge.config = vec![0; codec::MAX_RECORD_BYTES + 1];
    assert!(matches!(
        journal.append(Record::Adopt(huge)),
        Err(JournalError::TooLong { .. })
    ));
    journal.append(Record::Adopt(adopt("a"))).unwrap();
    // A full disk stands in for all else that can go wrong with a write.
    let full = File::options().append(true).open("/dev/full").unwrap();
    let good = std::mem::replace(&mut journal.lock().file, full);
    assert!(matches!(
        journal.append(Record::Adopt(adopt("b"))),
        Err(JournalError::Io { .. })
    ));
    assert!(matches!(
        journal.append(Record::Adopt(adopt("c"))),
        Err(JournalError::Broken)
    ));
    drop(good);
    journal.compact().unwrap();
    journal.append(Record::Adopt(adopt("d"))).unwrap();
    let contents = Journal::open(&path).unwrap().contents();
    assert_eq!(contents.adopted.keys().collect::<Vec<_>>(), ["a", "d"]);
}

#[test]
fn hostile_journals_are_dropped_where_they_turn_so() {
    let good = journal_of(&[Record::Adopt(adopt("a"))]);
    let table: [(&[u8], &str); 6] = [
        (&[1], "a record is cut off"),
        (&[0xff; 12], "a record is too long"),
        (&[0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0], "a record is too long"),
        (&[9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "a record is cut off"),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9], "a record's checksum is wrong"),
        // Length 0 and the checksum of nothing: whole, and of no kind.
        (
            &[0, 0, 0, 0, 0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14],
            "a record of an unknown kind",
        ),
    ];
    for (tail, reason) in table {
        let (records, damage) = codec::decode(&[&good, tail].concat());
        assert_eq!(records.len(), 1);
        assert_eq!(damage, Some(codec::Damage { at: good.len(), reason }));
    }
    let (records, damage) = codec::decode(b"#!/bin/sh\n");
    assert!(records.is_empty() && damage.is_some_and(|damage| damage.at == 0));
    assert_eq!(codec::decode(b""), (vec![], None));
}

/// A generator that gives the same numbers on every run.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}

#[test]
fn mutated_journals_give_no_record_that_was_not_written() {
    let written: Vec<Record> = ["a", "b", "c"].iter().map(|id| Record::Adopt(adopt(id))).collect();
    let good = journal_of(&written);
    let mut random = Seeded(0x9e37_79b9_7f4a_7c15);
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..=random.below(3) {
            match random.below(3) {
                0 => {
                    let at = random.below(bytes.len());
                    bytes[at] ^= 1 << random.below(8);
                }
                1 => bytes.truncate(random.below(bytes.len()) + 1),
                _ => {
                    let at = random.below(bytes.len());
                    bytes.insert(at, 0xa5);
                }
            }
        }
        let (records, damage) = codec::decode(&bytes);
        assert!(damage.is_some() || records.len() <= 3);
        assert!(records.iter().all(|record| written.contains(record)), "{bytes:?}");
    }
}

proptest! {
    #[test]
    fn a_journal_cut_anywhere_holds_what_is_before_the_cut(
        records in proptest::collection::vec(any_record(), 0..12),
        cut: prop::sample::Index,
    ) {
        let whole = journal_of(&records);
        let (all, damage) = codec::decode(&whole);
        prop_assert_eq!((&all, damage), (&records, None));
        let (some, _) = codec::decode(&whole[..cut.index(whole.len())]);
        prop_assert!(records.starts_with(&some));
    }

    #[test]
    fn rewriting_changes_nothing(records in proptest::collection::vec(any_record(), 0..24)) {
        let mut contents = Contents::default();
        records.into_iter().for_each(|record| contents.apply(record));
        let mut again = Contents::default();
        contents.records().for_each(|record| again.apply(record));
        prop_assert_eq!(again, contents);
    }

    #[test]
    fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (_, damage) = codec::decode(&[codec::MAGIC.as_slice(), &bytes].concat());
        prop_assert!(bytes.is_empty() || damage.is_some());
    }
}
