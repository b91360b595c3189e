//! How much to fetch around a miss: little for scattered reads, doubling for those that go on where the last fetch ended.
//!
//! Positions are those of the blob, not of files: reading one large file and reading many small files in the order of the layer are
//! the same to the network. In a small layer scattered misses grow their windows too, when there are many in a short time: somebody
//! goes through it, and a few large requests cost less than many small ones.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::sequence::Sequence;

/// Sequences told apart at a time in one layer; the one unused for longest is forgotten.
const MAX_STREAMS: usize = 16;
/// A miss that lies no further behind its sequence's end goes on with it without a gap (tar headers lie between files).
const CONTIGUOUS: u64 = 64 << 10;
/// Layers up to this size are small: all of one costs less than the round trips of a hundred misses.
const SMALL_LAYER: u64 = 64 << 20;
/// Scattered misses for each doubling of the window.
const MISSES_PER_DOUBLING: u32 = 3;
/// Time without a scattered miss after which they are counted anew.
const FORGET_AFTER: Duration = Duration::from_secs(2);

/// What to fetch for a miss.
#[derive(Debug, Clone)]
pub(super) struct Window {
    /// Compressed bytes.
    pub(super) length: u64,
    /// Whether it goes on exactly where the sequence's last fetch ended.
    pub(super) is_contiguous: bool,
    /// The reads it belongs to.
    pub(super) sequence: Sequence,
}

#[derive(Debug, Clone)]
struct Stream {
    /// Where its last fetch ended.
    end: u64,
    /// Length of its last window.
    window: u64,
    sequence: Sequence,
}

#[derive(Debug)]
pub(super) struct Readahead {
    least: u64,
    most: u64,
    is_small: bool,
    /// Most recently used last.
    streams: VecDeque<Stream>,
    scattered: u32,
    last_scattered: Option<Instant>,
}

impl Readahead {
    /// Windows from `least` to `most` in a blob of `blob_size` bytes.
    pub(super) fn new(least: u64, most: u64, blob_size: u64) -> Self {
        Self {
            least,
            most: most.max(least),
            is_small: blob_size <= SMALL_LAYER,
            streams: VecDeque::new(),
            scattered: 0,
            last_scattered: None,
        }
    }

    /// The window for a miss at `start`.
    pub(super) fn window(&mut self, start: u64) -> Window {
        // A sequence skips what is resident already, so its next miss may lie a little further on.
        let follows = |stream: &Stream| start >= stream.end && start - stream.end <= self.least;
        let found = self.streams.iter().position(follows);
        let found = found.and_then(|at| self.streams.remove(at));
        let (length, is_contiguous, sequence) = match found {
            Some(stream) => (
                stream.window.saturating_mul(2).min(self.most),
                start - stream.end <= CONTIGUOUS,
                stream.sequence,
            ),
            None => (self.scattered_window(), false, Sequence::default()),
        };
        if self.streams.len() == MAX_STREAMS {
            self.streams.pop_front();
        }
        self.streams.push_back(Stream {
            end: start,
            window: length,
            sequence: sequence.clone(),
        });
        Window {
            length,
            is_contiguous,
            sequence,
        }
    }

    fn scattered_window(&mut self) -> u64 {
        let now = Instant::now();
        let lately = |before: Instant| now.saturating_duration_since(before) <= FORGET_AFTER;
        if !self.last_scattered.replace(now).is_some_and(lately) {
            self.scattered = 0;
        }
        let doublings = if self.is_small {
            self.scattered / MISSES_PER_DOUBLING
        } else {
            0
        };
        self.scattered = self.scattered.saturating_add(1);
        self.least.saturating_mul(1 << doublings.min(16)).min(self.most)
    }

    /// Tells where the fetch for the window last given ends.
    pub(super) fn reached(&mut self, end: u64) {
        if let Some(stream) = self.streams.back_mut() {
            stream.end = end;
        }
    }

    /// Tells that what follows a sequence was fetched ahead, up to `end`.
    pub(super) fn went_on(&mut self, sequence: &Sequence, end: u64) {
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.sequence.is(sequence)) {
            stream.end = stream.end.max(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: u64 = SMALL_LAYER + 1;

    #[test]
    fn windows_double_for_each_sequence_and_stay_small_for_scattered_reads() {
        let mut readahead = Readahead::new(100, 800, LARGE);
        let mut positions = [0u64, 1_000_000];
        for (round, expected) in [100, 200, 400, 800, 800].into_iter().enumerate() {
            for position in &mut positions {
                let window = readahead.window(*position);
                assert_eq!((window.length, window.is_contiguous), (expected, round > 0));
                *position += window.length;
                readahead.reached(*position);
            }
        }
        for scattered in 0..100 {
            let window = readahead.window(10_000_000 + scattered * 5_000);
            assert_eq!((window.length, window.is_contiguous), (100, false));
            assert!(readahead.streams.len() <= MAX_STREAMS);
        }
    }

    #[test]
    fn many_scattered_misses_of_a_small_layer_take_more_and_more_of_it() {
        let mut readahead = Readahead::new(100, 800, SMALL_LAYER);
        let windows: Vec<u64> = (0..11)
            .map(|n| readahead.window(1_000_000 - n * 5_000).length)
            .collect();
        assert_eq!(windows, [100, 100, 100, 200, 200, 200, 400, 400, 400, 800, 800]);
        readahead.last_scattered = Instant::now().checked_sub(2 * FORGET_AFTER);
        assert_eq!(readahead.window(5).length, 100);
    }

    #[test]
    fn what_was_fetched_ahead_belongs_to_its_sequence() {
        let mut readahead = Readahead::new(100, 800, LARGE);
        let first = readahead.window(0);
        readahead.reached(100);
        readahead.went_on(&first.sequence, 5_000);
        readahead.went_on(&Sequence::default(), 9_000);
        let next = readahead.window(5_000);
        assert!(next.is_contiguous && next.sequence.is(&first.sequence) && next.length == 200);
    }
}
