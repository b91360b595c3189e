//! How much to fetch around a miss: little for scattered reads, doubling for those that go on where the last fetch ended.
//!
//! Positions are those of the blob, not of files: reading one large file and reading many small files in the order of the layer are
//! the same to the network.

use std::collections::VecDeque;

/// Sequences told apart at a time in one layer; the one unused for longest is forgotten.
const MAX_STREAMS: usize = 16;

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// Where its last fetch ended.
    end: u64,
    /// Length of its last window.
    window: u64,
}

#[derive(Debug)]
pub(super) struct Readahead {
    least: u64,
    most: u64,
    /// Most recently used last.
    streams: VecDeque<Stream>,
}

impl Readahead {
    pub(super) fn new(least: u64, most: u64) -> Self {
        Self {
            least,
            most: most.max(least),
            streams: VecDeque::new(),
        }
    }

    /// The window for a miss at `start`.
    pub(super) fn window(&mut self, start: u64) -> u64 {
        // A sequence skips what is resident already, so its next miss may lie a little further on.
        let follows = |stream: &Stream| start >= stream.end && start - stream.end <= self.least;
        let window = match self
            .streams
            .iter()
            .position(follows)
            .and_then(|at| self.streams.remove(at))
        {
            Some(stream) => stream.window.saturating_mul(2).min(self.most),
            None => self.least,
        };
        if self.streams.len() == MAX_STREAMS {
            self.streams.pop_front();
        }
        self.streams.push_back(Stream { end: start, window });
        window
    }

    /// Tells where the fetch for the window last given ends.
    pub(super) fn reached(&mut self, end: u64) {
        if let Some(stream) = self.streams.back_mut() {
            stream.end = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_double_for_each_sequence_and_stay_small_for_scattered_reads() {
        let mut readahead = Readahead::new(100, 800);
        let mut positions = [0u64, 1_000_000];
        for expected in [100, 200, 400, 800, 800] {
            for position in &mut positions {
                let window = readahead.window(*position);
                assert_eq!(window, expected);
                *position += window;
                readahead.reached(*position);
            }
        }
        for scattered in 0..100 {
            assert_eq!(readahead.window(10_000_000 + scattered * 5_000), 100);
            assert!(readahead.streams.len() <= MAX_STREAMS);
        }
    }
}
