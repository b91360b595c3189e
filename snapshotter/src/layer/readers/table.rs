//! Readers and what they have waited for, in bounded memory.

use std::collections::HashMap;

use super::{MAX_READERS, Reader, ReaderReport, Waits};

/// At most [`MAX_READERS`] readers.
#[derive(Debug, Default)]
pub(super) struct Table {
    readers: HashMap<Reader, Known>,
    /// How often something was added.
    added: u64,
}

#[derive(Debug)]
struct Known {
    waits: Waits,
    /// When it was added to last, as a number: the clock on the wall may go back.
    added: u64,
}

impl Table {
    /// Adds to what a reader has waited for.
    pub(super) fn add(&mut self, reader: Reader, waits: &Waits) {
        self.added += 1;
        if let Some(known) = self.readers.get_mut(&reader) {
            known.added = self.added;
            return known.waits.add(waits);
        }
        if self.readers.len() >= MAX_READERS {
            let oldest = self.readers.iter().min_by_key(|(_, known)| known.added);
            if let Some(oldest) = oldest.map(|(reader, _)| reader.clone()) {
                self.readers.remove(&oldest);
            }
        }
        let known = Known {
            waits: *waits,
            added: self.added,
        };
        self.readers.insert(reader, known);
    }

    /// All of them, those first that have waited longest.
    pub(super) fn report(&self) -> Vec<ReaderReport> {
        let report = |(reader, known): (&Reader, &Known)| ReaderReport {
            reader: reader.clone(),
            waits: known.waits,
        };
        let mut reports: Vec<_> = self.readers.iter().map(report).collect();
        // Names decide where the numbers do not, so that two reports are in the same order.
        reports.sort_by(|a, b| {
            let key = |report: &ReaderReport| (report.waits.waited, report.waits.reads);
            key(b)
                .cmp(&key(a))
                .then_with(|| a.reader.command.cmp(&b.reader.command))
        });
        reports
    }
}
