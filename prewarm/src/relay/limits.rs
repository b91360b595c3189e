//! The relay's bounds.

use std::time::Duration;

use crate::containerd::MAX_MESSAGE_BYTES;

/// The relay's bounds. [`Limits::default`] is what production runs with; tests make them small.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections of clients. One more is closed at once, so that its client hears of it instead of waiting.
    pub connections: usize,
    /// Calls under way of one connection. More wait in the client, as HTTP/2 has it. No less than 100: that is what
    /// clients assume before they have heard of the limit.
    pub streams: u32,
    /// Unread bytes of one stream, each way.
    pub stream_window: u32,
    /// Unread bytes of one connection, each way. Many times the stream's window, so that a few streams which nobody
    /// reads do not hold up the others.
    pub connection_window: u32,
    /// Bytes of a stream that wait to be written to a socket.
    pub send_buffer: usize,
    /// Size of a request's header list, as HTTP/2 counts it.
    pub request_headers: u32,
    /// Size of the header list of containerd's answers; statuses with details can be long.
    pub answer_headers: u32,
    /// Largest message that is gathered: containerd itself accepts no larger one.
    pub message: usize,
    /// Up to this size a gathered message is small: it takes of its connection's own bytes, not of those that all share.
    pub small: usize,
    /// Bytes of a connection's small messages, each way.
    pub own: usize,
    /// Bytes of all large gathered requests, one of each connection. At least twice [`Self::message`].
    pub requests: usize,
    /// Bytes of all large gathered answers, one of each connection. Apart from the requests' bytes, so that a call which holds a request never waits
    /// for one that does. At least twice [`Self::message`].
    pub answers: usize,
    /// How long a connection may take to say that it speaks HTTP/2.
    pub handshake: Duration,
    /// How long connecting to containerd's socket may take.
    pub connect: Duration,
    /// How long a gathered request may take to come whole, memory for it included. How long the rest of an answer's message
    /// may take once it has begun and there is memory for it.
    pub gather: Duration,
    /// How long nothing may come of a request that has begun to come.
    pub quiet: Duration,
    /// How long a client may read nothing of a large answer.
    pub stalled: Duration,
    /// How long a client may take to read one gathered message.
    pub reading: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            streams: 1024,
            stream_window: 256 << 10,
            connection_window: 32 << 20,
            send_buffer: 256 << 10,
            request_headers: 256 << 10,
            answer_headers: 1 << 20,
            message: MAX_MESSAGE_BYTES,
            small: 256 << 10,
            own: 4 << 20,
            requests: 4 * MAX_MESSAGE_BYTES,
            answers: 4 * MAX_MESSAGE_BYTES,
            handshake: Duration::from_secs(10),
            connect: Duration::from_secs(5),
            gather: Duration::from_secs(30),
            quiet: Duration::from_secs(3),
            stalled: Duration::from_secs(5),
            reading: Duration::from_secs(30),
        }
    }
}
