//! Setting up the content of a regular file, above all its sparse map.

use std::io::Read;

use super::fields::Sparseness;
use super::{BLOCK, BLOCK_U64, Block, Body, TarError, TarReader, numeric, padding_of};
use crate::input::sparse::{self, PaxSparse};

impl<R: Read> TarReader<R> {
    /// Sets up the content of a regular file and returns its expanded size.
    pub(super) fn open_body(
        &mut self,
        header: &Block,
        sparseness: Sparseness,
        mut stored: u64,
        bad: &impl Fn(&'static str) -> TarError,
    ) -> Result<u64, TarError> {
        const FIELD: &str = "sparse map";
        let padding = padding_of(stored);
        stored
            .checked_add(padding)
            .and_then(|n| n.checked_add(self.position))
            .ok_or_else(|| bad("size"))?;
        let map = match sparseness {
            Sparseness::Dense => None,
            Sparseness::Old => Some(self.old_sparse_map(header)?.ok_or_else(|| bad(FIELD))?),
            Sparseness::Pax(PaxSparse::Listed { size, segments }) => Some((size, segments)),
            Sparseness::Pax(PaxSparse::InContent { size }) => {
                let segments = self.content_map(&mut stored)?.ok_or_else(|| bad(FIELD))?;
                Some((size, segments))
            }
        };
        let map = match map {
            None => sparse::Map {
                size: stored,
                segments: vec![(0, stored)],
            },
            Some((size, segments)) => sparse::Map::checked(size, segments, stored).ok_or_else(|| bad(FIELD))?,
        };
        self.holes_left = self
            .holes_left
            .checked_sub(map.size - stored)
            .ok_or_else(|| bad("sparse map: the layer's sparse files have more than 64 GiB of holes"))?;
        let size = map.size;
        let mut segments = map.segments.into_iter();
        let segment = segments.next().unwrap_or((size, 0));
        self.body = Body {
            size,
            segments,
            segment,
            stored_left: stored,
            padding,
            ..Body::default()
        };
        Ok(size)
    }

    /// The map of GNU's old sparse format: four segments in the header, more in blocks behind it.
    fn old_sparse_map(&mut self, header: &Block) -> Result<Option<(u64, Vec<sparse::Segment>)>, TarError> {
        let mut segments = Vec::new();
        let size = numeric(&header[483..495]).and_then(|n| u64::try_from(n).ok());
        let mut sound = sparse::binary_segments(&header[386..482], &mut segments).is_some();
        let mut more = header[482] != 0;
        while more && sound && segments.len() <= sparse::MAX_SEGMENTS {
            let mut block = [0; BLOCK];
            self.exact(&mut block, "a sparse map")?;
            sound = sparse::binary_segments(&block[..504], &mut segments).is_some();
            more = block[504] != 0;
        }
        Ok(size.filter(|_| sound && !more).map(|size| (size, segments)))
    }

    /// The map of format 1.0, in whole blocks in front of the content.
    fn content_map(&mut self, stored: &mut u64) -> Result<Option<Vec<sparse::Segment>>, TarError> {
        let mut map = sparse::ContentMap::default();
        loop {
            let Some(left) = stored.checked_sub(BLOCK_U64) else {
                return Ok(None);
            };
            let mut block = [0; BLOCK];
            self.exact(&mut block, "a sparse map")?;
            *stored = left;
            match map.block(&block) {
                None => return Ok(None),
                Some(Some(segments)) => return Ok(Some(segments)),
                Some(None) => {}
            }
        }
    }
}
