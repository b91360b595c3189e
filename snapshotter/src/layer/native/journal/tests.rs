//! The journal as a predecessor leaves it that died at any moment. A pipe stands in for the group: what counts is what is read.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::layer::native::event::PRE_ACCESS;

fn layer(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn encoded(fd: i32, offset: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(48_u32.to_ne_bytes());
    bytes.extend([3, 0]);
    bytes.extend(24_u16.to_ne_bytes());
    bytes.extend(PRE_ACCESS.to_ne_bytes());
    bytes.extend(fd.to_ne_bytes());
    bytes.extend(1_i32.to_ne_bytes());
    bytes.extend([6, 0]);
    bytes.extend(24_u16.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend(offset.to_ne_bytes());
    bytes.extend(4096_u64.to_ne_bytes());
    bytes
}

/// A group that tells of these events.
fn group(numbers: impl IntoIterator<Item = i32>) -> OwnedFd {
    let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
    let (reader, writer) = rustix::pipe::pipe_with(flags).unwrap();
    for number in numbers {
        rustix::io::write(&writer, &encoded(number, u64::try_from(number).unwrap() * 4096)).unwrap();
    }
    // Nobody writes to it any more; without a writer a read would give an end, and a group has none.
    std::mem::forget(writer);
    reader
}

fn numbers(slot: &Slot) -> BTreeSet<i32> {
    slot.left().into_iter().map(|entry| entry.number).collect()
}

/// The journal that the next process finds.
fn successor(journal: &Journal) -> Arc<Journal> {
    Arc::new(Journal::kept(journal.as_fd().try_clone_to_owned().unwrap()).unwrap())
}

#[test]
fn what_was_read_and_not_answered_is_found_by_the_next_process() {
    let journal = Arc::new(Journal::new().unwrap());
    let slot = journal.claim(&layer("a")).unwrap();
    let other = journal.claim(&layer("b")).unwrap();
    let group = group([7, 8, 9]);
    let Received::Events(events) = slot.receive(group.as_fd(), 100).unwrap() else {
        panic!("nothing was received");
    };
    assert_eq!(events.len(), 3);
    assert!(matches!(slot.receive(group.as_fd(), 100).unwrap(), Received::Nothing));
    slot.forget(8);

    let next = successor(&journal);
    assert!(next.resume(&layer("c")).is_none());
    let found = next.resume(&layer("a")).unwrap();
    let expected = |number: i32| Entry {
        number,
        asked: Asked::Range {
            offset: u64::try_from(number).unwrap() * 4096,
            count: 4096,
        },
    };
    assert_eq!(found.left(), [expected(7), expected(9)]);
    // Once: nobody else goes on with it.
    assert!(next.resume(&layer("a")).is_none());
    assert!(next.resume(&layer("b")).unwrap().left().is_empty());
    drop(other);
}

#[test]
fn slots_come_back_when_their_layers_have_gone() {
    let journal = Arc::new(Journal::new().unwrap());
    let slots: Vec<_> = (0..SLOTS)
        .map(|number| journal.claim(&layer(&number.to_string())).unwrap())
        .collect();
    assert!(journal.claim(&layer("more")).is_none());
    slots.into_iter().for_each(Slot::release);
    let slot = journal.claim(&layer("more")).unwrap();
    assert!(slot.left().is_empty());
    // A process that dies frees none; its successor does, of layers that it does not go on with.
    let next = successor(&journal);
    let resumed = next.resume(&layer("more")).unwrap();
    next.sweep();
    assert!(successor(&journal).resume(&layer("more")).is_some());
    resumed.release();
    assert!(successor(&journal).resume(&layer("more")).is_none());
}

#[test]
fn no_more_is_read_than_there_is_room_for() {
    let journal = Arc::new(Journal::new().unwrap());
    let slot = journal.claim(&layer("a")).unwrap();
    let mut next = 0;
    while slot.occupied() < MAX_PENDING {
        let most = i32::try_from(MAX_PENDING).unwrap();
        let group = group(next..most.min(next + 60));
        while let Received::Events(events) = slot.receive(group.as_fd(), 11).unwrap() {
            assert!(events.len() <= 11);
            next += i32::try_from(events.len()).unwrap();
        }
    }
    let more = group([1_000]);
    assert!(matches!(slot.receive(more.as_fd(), 100).unwrap(), Received::Full));
    slot.forget(5);
    assert!(matches!(slot.receive(more.as_fd(), 0).unwrap(), Received::Full));
    assert!(matches!(slot.receive(more.as_fd(), 100).unwrap(), Received::Events(events) if events.len() == 1));
    assert!(numbers(&slot).contains(&1_000) && !numbers(&slot).contains(&5));
}

#[test]
fn a_journal_of_another_kind_is_refused() {
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    assert!(matches!(Journal::kept(file), Err(JournalError::Length { .. })));
    let open = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&open, Journal::bytes()).unwrap();
    // It could be cut short under the mapping.
    assert!(matches!(Journal::kept(open), Err(JournalError::Length { .. })));
}

/// What a process does that has read events, in the order in which it stores words; it dies after some of them.
fn interrupted(events: &[Event], stores: usize, slot: &Slot, answered: &[i32]) {
    let mut left = stores;
    let mut store = |word: &AtomicU64, value: u64| {
        if left > 0 {
            left -= 1;
            word.store(value, Ordering::Release);
        }
    };
    for event in events {
        let entry = Entry {
            number: event.fd,
            asked: event.asked,
        };
        let [first, second] = entry.words().unwrap();
        let free = slot
            .table()
            .find(|entry| entry[0].load(Ordering::Acquire) == 0)
            .unwrap();
        store(&free[1], second);
        store(&free[0], first);
    }
    for word in &slot.words()[INBOX] {
        store(word, 0);
    }
    for number in answered {
        let of_it = slot.table().find(|entry| {
            Entry::from_words([entry[0].load(Ordering::Acquire), 0]).is_some_and(|entry| entry.number == *number)
        });
        if let Some(entry) = of_it {
            store(&entry[0], 0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nothing_is_lost_whenever_a_process_dies(
        numbers_read in prop::collection::btree_set(3..400_i32, 1..30),
        answered in 0..30_usize,
        stores in 0..400_usize,
    ) {
        let journal = Arc::new(Journal::new().unwrap());
        let slot = journal.claim(&layer("a")).unwrap();
        // The kernel has written the events into the inbox, and has begun to wait for answers.
        let bytes: Vec<u8> = numbers_read.iter().flat_map(|number| encoded(*number, 0)).collect();
        for (word, bytes) in slot.words()[INBOX].iter().zip(bytes.chunks_exact(8)) {
            word.store(u64::from_ne_bytes(bytes.try_into().unwrap()), Ordering::Release);
        }
        let events = Slot::events_in(&slot.words()[INBOX]);
        prop_assert_eq!(events.len(), numbers_read.len());
        let answered: Vec<i32> = numbers_read.iter().copied().take(answered).collect();
        interrupted(&events, stores, &slot, &answered);

        let found = numbers(&successor(&journal).resume(&layer("a")).unwrap());
        let must: BTreeSet<i32> = numbers_read.iter().copied().filter(|number| !answered.contains(number)).collect();
        prop_assert!(must.is_subset(&found), "{must:?} of {found:?}");
        prop_assert!(found.is_subset(&numbers_read), "{found:?} of {numbers_read:?}");
    }
}
