//! Where the contents of a layer wait between the two passes of a conversion.
//!
//! Small layers stay in memory; larger ones go to a file without a name, which the kernel removes whatever happens.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Contents up to this size are kept in memory.
pub(super) const MEMORY_BYTES: usize = 16 << 20;

/// Append-only storage, read at any offset.
#[derive(Debug)]
pub(super) struct Spool {
    dir: Option<PathBuf>,
    // All of the content while there is no file, afterwards its end that the file does not have yet.
    pending: Vec<u8>,
    file: Option<File>,
    written: u64,
}

impl Spool {
    pub(super) fn new(dir: Option<&Path>) -> Self {
        Self {
            dir: dir.map(Path::to_owned),
            pending: Vec::new(),
            file: None,
            written: 0,
        }
    }

    /// Where the next byte will be.
    pub(super) fn end(&self) -> u64 {
        self.written + self.pending.len() as u64
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.pending.len() + bytes.len() > MEMORY_BYTES {
            self.flush()?;
        }
        self.pending.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(match &self.dir {
                Some(dir) => tempfile::tempfile_in(dir)?,
                None => tempfile::tempfile()?,
            }),
        };
        file.write_all(&self.pending)?;
        self.written += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Fills `buf` from `offset`; all of it must have been appended.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let stored = usize::try_from(self.written.saturating_sub(offset))
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let (head, tail) = buf.split_at_mut(stored);
        if let Some(file) = &self.file {
            file.read_exact_at(head, offset)?;
        }
        let start = usize::try_from(offset.saturating_sub(self.written)).unwrap_or(usize::MAX);
        let pending = start
            .checked_add(tail.len())
            .and_then(|end| self.pending.get(start..end));
        tail.copy_from_slice(pending.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_from_memory_from_the_file_and_across_both() {
        let mut spool = Spool::new(None);
        let block: Vec<u8> = (0..=250).collect::<Vec<u8>>().repeat(4096);
        let mut all = Vec::new();
        for round in 0..20 {
            assert_eq!(spool.end(), all.len() as u64);
            spool.append(&block).unwrap();
            all.extend_from_slice(&block);
            assert_eq!(spool.file.is_some(), all.len() > MEMORY_BYTES, "{round}");
        }
        let on_file = usize::try_from(spool.written).unwrap();
        for (start, end) in [
            (0, 10),
            (on_file - 100, on_file + 100),
            (on_file, all.len()),
            (0, all.len()),
        ] {
            let mut buf = vec![0; end - start];
            spool.read(start as u64, &mut buf).unwrap();
            assert!(buf == all[start..end], "{start}..{end}");
        }
        assert!(spool.read(all.len() as u64 - 1, &mut [0; 2]).is_err());
        assert!(spool.read(u64::MAX, &mut [0; 2]).is_err());
    }

    #[test]
    fn a_spool_directory_that_cannot_be_used_is_an_error() {
        let mut spool = Spool::new(Some(Path::new("/nonexistent")));
        spool.append(&vec![0; MEMORY_BYTES]).unwrap();
        assert!(spool.append(b"x").is_err());
    }
}
