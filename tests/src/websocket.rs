//! Just enough of WebSocket to use the URLs that CRI's Exec, Attach and PortForward answer, as kubectl's server side
//! would: the first byte of a message is its channel.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// The protocol of channels with binary content.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// Every step is answered within this time.
const LIMIT: Duration = Duration::from_secs(20);

/// The longest answer head and the longest frame that are read.
const MAX_HEAD: usize = 16 << 10;
const MAX_FRAME: u64 = 1 << 20;

const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;

/// An open connection.
#[derive(Debug)]
pub struct WebSocket {
    stream: TcpStream,
}

impl WebSocket {
    /// Opens `url` (`http://address/path`), with a query if there is one.
    pub async fn open(url: &str, query: &str) -> Result<Self> {
        tokio::time::timeout(LIMIT, Self::upgrade(url, query))
            .await
            .with_context(|| format!("{url} does not answer"))?
            .with_context(|| format!("cannot open {url}"))
    }

    async fn upgrade(url: &str, query: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").context("not an http URL")?;
        let (address, path) = rest.split_once('/').context("a URL without a path")?;
        let mut stream = TcpStream::connect(address).await?;
        // The key is echoed as a digest, against caches; nothing is between us and the server.
        let head = format!(
            "GET /{path}?{query} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Origin: http://{address}\r\nSec-WebSocket-Key: aHVsbHNwZWVkLXRlc3RzIQ==\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            ensure!(answer.len() < MAX_HEAD, "an endless answer");
            answer.push(stream.read_u8().await?);
        }
        let answer = String::from_utf8_lossy(&answer).into_owned();
        ensure!(
            answer.starts_with("HTTP/1.1 101"),
            "the answer is {:?}",
            answer.lines().next()
        );
        Ok(Self { stream })
    }

    /// Sends bytes on a channel.
    pub async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let length = u8::try_from(bytes.len() + 1).ok().filter(|length| *length < 126);
        let length = length.context("a message too long for this client")?;
        // A client masks what it sends; a mask of zeros changes nothing.
        let mut frame = vec![0x80 | BINARY, 0x80 | length, 0, 0, 0, 0, channel];
        frame.extend_from_slice(bytes);
        self.stream.write_all(&frame).await.context("cannot send")
    }

    /// The next message: its channel and bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            let Ok(first) = self.stream.read_u8().await else {
                return Ok(None);
            };
            let mut length = u64::from(self.stream.read_u8().await? & 0x7f);
            if length == 126 {
                length = u64::from(self.stream.read_u16().await?);
            } else if length == 127 {
                length = self.stream.read_u64().await?;
            }
            ensure!(length <= MAX_FRAME, "a frame of {length} bytes");
            let mut content = vec![0; usize::try_from(length)?];
            self.stream.read_exact(&mut content).await?;
            match first & 0x0f {
                CLOSE => return Ok(None),
                PING => {}
                _ if content.is_empty() => {}
                _ => return Ok(Some((content[0], content.split_off(1)))),
            }
        }
    }

    /// All that comes, by channel, until the end, or until a channel's bytes contain `enough`.
    pub async fn read(&mut self, enough: &str) -> Result<BTreeMap<u8, String>> {
        let mut found: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
        let collected = tokio::time::timeout(LIMIT, async {
            while let Some((channel, bytes)) = self.next().await? {
                let content = found.entry(channel).or_default();
                content.extend(bytes);
                if !enough.is_empty() && String::from_utf8_lossy(content).contains(enough) {
                    break;
                }
            }
            Ok::<_, anyhow::Error>(())
        });
        match collected.await {
            Ok(done) => done?,
            Err(_) => bail!("no end within {LIMIT:?}; so far: {found:?}"),
        }
        let texts = found.into_iter();
        Ok(texts
            .map(|(channel, bytes)| (channel, String::from_utf8_lossy(&bytes).into_owned()))
            .collect())
    }
}
