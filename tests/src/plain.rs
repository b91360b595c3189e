//! The simplest client of a registry: one connection, one range after the other, nothing but the bytes. What it takes
//! for that is what a link and a registry give at best to a client without ideas.

use std::net::SocketAddr;
use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Longest head of an answer that is read.
const MAX_HEAD: usize = 16 << 10;

/// Bytes taken at once.
const BUFFER: usize = 256 << 10;

/// A kept connection.
pub struct PlainClient {
    stream: TcpStream,
    host: SocketAddr,
    buffer: Vec<u8>,
}

impl PlainClient {
    /// Connects to a registry that wants no login.
    pub async fn connect(host: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(host)
            .await
            .with_context(|| format!("cannot connect to {host}"))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            host,
            buffer: vec![0; BUFFER],
        })
    }

    /// Reads these bytes of a blob to the end; the registry has to answer with exactly them.
    pub async fn range(&mut self, repository: &str, digest: &str, range: Range<u64>) -> Result<()> {
        let last = range.end.checked_sub(1).context("an empty range")?;
        let request = format!(
            "GET /v2/{repository}/blobs/{digest} HTTP/1.1\r\nHost: {}\r\nRange: bytes={}-{last}\r\n\r\n",
            self.host, range.start
        );
        self.stream.write_all(request.as_bytes()).await?;
        let mut filled = 0;
        let end = loop {
            let read = self.stream.read(&mut self.buffer[filled..]).await?;
            ensure!(read > 0, "the connection ended within an answer's head");
            filled += read;
            let found = self.buffer[..filled]
                .windows(4)
                .position(|window| window == b"\r\n\r\n");
            if let Some(end) = found {
                break end + 4;
            }
            ensure!(filled < MAX_HEAD, "an answer's head is too long");
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
        let status = head.lines().next().unwrap_or_default();
        ensure!(status.contains(" 206"), "a range is answered {status}");
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<u64>().ok());
        ensure!(
            length == Some(range.end - range.start),
            "{} bytes are answered with {length:?}",
            range.end - range.start
        );
        let mut left = (range.end - range.start)
            .checked_sub((filled - end) as u64)
            .context("more bytes than were asked for")?;
        while left > 0 {
            let limit = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let read = self.stream.read(&mut self.buffer[..limit]).await?;
            ensure!(read > 0, "the connection ended within a body");
            left -= read as u64;
        }
        Ok(())
    }
}
