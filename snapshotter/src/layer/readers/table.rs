//! Readers and what they have waited for, in bounded memory.

use std::collections::HashMap;

use super::{MAX_READERS, Reader, ReaderReport, Waits};

/// At most [`MAX_READERS`] readers.
#[derive(Debug, Default)]
pub(super) struct Table {
    readers: HashMap<Reader, Waits>,
}

impl Table {
    /// Adds to what a reader has waited for.
    pub(super) fn add(&mut self, reader: Reader, waits: &Waits) {
        if let Some(known) = self.readers.get_mut(&reader) {
            return known.add(waits);
        }
        if self.readers.len() >= MAX_READERS {
            let oldest = self.readers.iter().min_by_key(|(_, waits)| waits.last);
            if let Some(oldest) = oldest.map(|(reader, _)| reader.clone()) {
                self.readers.remove(&oldest);
            }
        }
        self.readers.insert(reader, *waits);
    }

    /// All of them, those first that have waited longest.
    pub(super) fn report(&self) -> Vec<ReaderReport> {
        let report = |(reader, waits): (&Reader, &Waits)| ReaderReport {
            reader: reader.clone(),
            waits: *waits,
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
