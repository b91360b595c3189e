//! The question every cold start ends with: does the pod answer?

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Pause between two questions.
const INTERVAL: Duration = Duration::from_millis(1);

/// A pod whose address is not up yet drops packets; the next try should not wait for the kernel's own time-outs.
const CONNECT_LIMIT: Duration = Duration::from_millis(100);

/// Once connected, the function may be at work on its first request.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The longest answer that is read.
const MAX_ANSWER: u64 = 1 << 20;

/// Asks `GET path` at `address` until the answer is a 200; returns its body.
pub async fn first_200(address: SocketAddr, path: &str, limit: Duration) -> Result<Vec<u8>> {
    let end = Instant::now() + limit;
    let mut last = String::from("never connected");
    while Instant::now() < end {
        match ask(address, path).await {
            Ok((200, body)) => return Ok(body),
            Ok((status, _)) => last = format!("status {status}"),
            Err(error) => last = error.to_string(),
        }
        tokio::time::sleep(INTERVAL).await;
    }
    bail!("http://{address}{path} did not answer 200 within {limit:?}: {last}")
}

async fn ask(address: SocketAddr, path: &str) -> std::io::Result<(u16, Vec<u8>)> {
    let mut stream = timeout(CONNECT_LIMIT, TcpStream::connect(address)).await??;
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    timeout(ANSWER_LIMIT, stream.take(MAX_ANSWER).read_to_end(&mut answer)).await??;
    parse(&answer).ok_or_else(|| std::io::Error::other("not an HTTP answer"))
}

fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let head_end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..head_end]).ok()?;
    let status = head.lines().next()?.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer[head_end + 4..].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart() {
        assert_eq!(
            parse(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nhello"),
            Some((200, b"hello".to_vec()))
        );
        assert_eq!(parse(b"HTTP/1.0 503 no\r\n\r\n"), Some((503, vec![])));
        assert_eq!(parse(b"garbage"), None);
    }
}
