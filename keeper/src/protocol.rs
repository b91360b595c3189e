//! Messages of the sd_notify protocol, as the supervising side reads them.

use crate::notification::is_name;

/// Most bytes of a message; longer ones are refused. systemd's bound.
pub const MESSAGE_LIMIT: usize = 4096;

/// Name of what comes without one, or with one that cannot be handed over; systemd's.
pub const UNNAMED: &str = "stored";

/// What a message asks for. Words that are not ours are passed over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Message<'a> {
    /// `BARRIER=1`
    pub barrier: bool,
    /// `FDSTORE=1`
    pub store: bool,
    /// `FDSTOREREMOVE=1`
    pub remove: bool,
    /// `FDNAME=`, if it can be handed over.
    pub name: Option<&'a str>,
    /// `READY=1`
    pub ready: bool,
    /// `STOPPING=1`
    pub stopping: bool,
    /// `STATUS=`, if it is text without control characters.
    pub status: Option<&'a str>,
}

impl<'a> Message<'a> {
    /// Reads a message; of a word that is there twice, the first counts.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Self {
        let mut message = Self::default();
        for line in bytes.split(|byte| *byte == b'\n') {
            match line {
                b"BARRIER=1" => message.barrier = true,
                b"FDSTORE=1" => message.store = true,
                b"FDSTOREREMOVE=1" => message.remove = true,
                b"READY=1" => message.ready = true,
                b"STOPPING=1" => message.stopping = true,
                _ => message.read_text(line),
            }
        }
        message
    }

    fn read_text(&mut self, line: &'a [u8]) {
        if let Some(name) = line.strip_prefix(b"FDNAME=") {
            let name = is_name(name).then_some(name).and_then(|name| str::from_utf8(name).ok());
            self.name = self.name.or(name);
        } else if let Some(status) = line.strip_prefix(b"STATUS=") {
            let status = str::from_utf8(status).ok();
            self.status = self.status.or(status.filter(|text| !text.contains(char::is_control)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words_are_read_and_others_passed_over() {
        let message = Message::parse(b"FDSTORE=1\nFDPOLL=0\nFDNAME=data-1\n");
        let expected = Message {
            store: true,
            name: Some("data-1"),
            ..Message::default()
        };
        assert_eq!(message, expected);
        let message = Message::parse(b"READY=1\nSTATUS=serving 3 layers\nMAINPID=1\nREADY=2\nFDSTORE=10");
        let expected = Message {
            ready: true,
            status: Some("serving 3 layers"),
            ..Message::default()
        };
        assert_eq!(message, expected);
        assert_eq!(Message::parse(b"FDNAME=a:b\nSTATUS=\x1b[1m\nX"), Message::default());
        assert_eq!(Message::parse(b""), Message::default());
        assert!(Message::parse(b"BARRIER=1").barrier && !Message::parse(b"BARRIER=1 ").barrier);
    }

    proptest! {
        #[test]
        fn arbitrary_datagrams_are_read(bytes in prop::collection::vec(any::<u8>(), 0..MESSAGE_LIMIT)) {
            let message = Message::parse(&bytes);
            prop_assert!(message.name.is_none_or(|name| is_name(name.as_bytes())));
        }

        #[test]
        fn mixtures_of_words_are_read(words in prop::collection::vec(prop_oneof![
            Just("FDSTORE=1".to_owned()), Just("FDSTOREREMOVE=1".to_owned()), Just("BARRIER=1".to_owned()),
            "FDNAME=.{0,300}", "STATUS=.{0,50}", "\\PC{0,20}",
        ], 0..12)) {
            let text = words.join("\n");
            let message = Message::parse(text.as_bytes());
            let lines: Vec<_> = text.split('\n').collect();
            prop_assert_eq!(message.store, lines.contains(&"FDSTORE=1"));
            prop_assert_eq!(message.remove, lines.contains(&"FDSTOREREMOVE=1"));
            prop_assert_eq!(message.barrier, lines.contains(&"BARRIER=1"));
            let name = lines.iter().filter_map(|line| line.strip_prefix("FDNAME=")).find(|name| is_name(name.as_bytes()));
            prop_assert_eq!(message.name, name);
        }
    }
}
