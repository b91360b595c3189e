//! Hands out the places of an image in the order in which they are asked for.
//!
//! Blocks come one behind the other. What is smaller than a block goes into one of the last few blocks that have room,
//! so that neither the rest of a block before a directory's blocks nor that before a large inode is lost, and what is
//! asked for together stays together.

use crate::format::{BLOCK, SLOT};

/// Blocks with room that are remembered. More would fill blocks better and put things further apart.
const OPEN_BLOCKS: usize = 4;

/// The next free places.
#[derive(Debug)]
pub(crate) struct Space {
    next_block: usize,
    /// Where room begins in a block that is not full, oldest first. Each ends with its block.
    open: Vec<usize>,
}

impl Space {
    /// All places from `start`, which lies in block 0.
    pub(crate) fn from(start: usize) -> Self {
        Self {
            next_block: 1,
            open: vec![start],
        }
    }

    /// Where `size` bytes begin that lie in one block if they fit in one, else begin with a block; a multiple of
    /// [`SLOT`].
    pub(crate) fn bytes(&mut self, size: usize) -> usize {
        let room = |start: usize| start.next_multiple_of(BLOCK) - start;
        if let Some(at) = self.open.iter().position(|start| size <= room(*start)) {
            let start = self.open[at];
            self.leave_open(Some(at), start + size);
            return start;
        }
        let start = self.blocks(size.div_ceil(BLOCK)) * BLOCK;
        self.leave_open(None, start + size);
        start
    }

    /// The first of `count` blocks.
    pub(crate) fn blocks(&mut self, count: usize) -> usize {
        let first = self.next_block;
        self.next_block += count;
        first
    }

    /// Blocks handed out so far.
    pub(crate) fn block_count(&self) -> usize {
        self.next_block
    }

    /// Whether nothing is left in the last of them.
    pub(crate) fn is_full(&self) -> bool {
        !self.open.iter().any(|start| start / BLOCK + 1 == self.next_block)
    }

    /// Remembers what is left behind `end`, instead of the room at position `at` if that was taken.
    fn leave_open(&mut self, at: Option<usize>, end: usize) {
        let start = end.next_multiple_of(SLOT);
        let full = start.is_multiple_of(BLOCK);
        match at {
            Some(at) if full => {
                self.open.remove(at);
            }
            Some(at) => self.open[at] = start,
            None if full => {}
            None => {
                if self.open.len() == OPEN_BLOCKS {
                    self.open.remove(0);
                }
                self.open.push(start);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_things_fill_the_gaps_that_large_ones_leave() {
        let mut space = Space::from(1280);
        assert_eq!(space.bytes(96), 1280);
        assert_eq!(space.bytes(3000), 4096, "does not fit in what is left of block 0");
        assert_eq!(space.blocks(2), 2);
        assert_eq!(space.bytes(65), 1376);
        assert_eq!(space.bytes(64), 1472, "the place before was rounded up");
        assert!(space.is_full());
        assert_eq!(space.bytes(4096), 4 * 4096);
        assert!(space.is_full());
        assert_eq!(space.bytes(5000), 5 * 4096);
        assert_eq!(space.bytes(3000), 6 * 4096 + 928);
        assert_eq!((space.block_count(), space.is_full()), (7, false));
    }

    #[test]
    fn nothing_overlaps_and_nothing_small_crosses_blocks() {
        let mut space = Space::from(1280);
        let mut taken: Vec<(usize, usize)> = Vec::new();
        for step in 0..2000usize {
            let size = 1 + step * step * 31 % 4300;
            if step % 17 == 0 {
                let count = 1 + step % 3;
                let first = space.blocks(count);
                taken.push((first * BLOCK, (first + count) * BLOCK));
            }
            let start = space.bytes(size);
            assert!(start.is_multiple_of(SLOT) && start >= 1280);
            assert!(start / BLOCK == (start + size - 1) / BLOCK || (size > BLOCK && start.is_multiple_of(BLOCK)));
            taken.push((start, start + size));
        }
        taken.sort_unstable();
        assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        assert!(taken.last().is_some_and(|last| last.1 <= space.block_count() * BLOCK));
    }
}
