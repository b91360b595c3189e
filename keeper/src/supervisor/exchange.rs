//! Messages: what the program asks of its keeper, and what the keeper tells who supervises it.

use std::os::fd::OwnedFd;

use super::{PAUSE, Supervisor};
use crate::inbox::Incoming;
use crate::log::Value;
use crate::protocol::{MESSAGE_LIMIT, Message, UNNAMED};
use crate::store::StoreError;

impl Supervisor {
    /// Reads messages, as many as there are but at most `limit`.
    pub(super) fn receive(&mut self, limit: usize) {
        let mut buffer = [0; MESSAGE_LIMIT];
        for _ in 0..limit {
            let child = self.child.as_ref().map(|child| child.process);
            match self.inbox.receive(child, &mut buffer) {
                Ok(Incoming::Nothing) => return,
                Ok(Incoming::Message {
                    length,
                    descriptors,
                    lost,
                }) => {
                    let bytes = buffer.get(..length).unwrap_or_default();
                    self.message(bytes, descriptors, lost);
                }
                Ok(Incoming::TooLong) => self.refuse("a message was too long", UNNAMED),
                Ok(Incoming::Stranger { process }) => self.stranger(process),
                Err(error) => {
                    self.log.error(
                        "a message cannot be received",
                        &[("error", error.to_string().as_str().into())],
                    );
                    // What stays is not looked at in a circle.
                    std::thread::sleep(PAUSE);
                    return;
                }
            }
        }
    }

    fn stranger(&mut self, process: i32) {
        self.strangers = self.strangers.saturating_add(1);
        // Who sends a flood does not get a flood of lines.
        if self.strangers.is_power_of_two() {
            let process = u64::try_from(process).unwrap_or_default();
            let fields = [
                ("process", Value::Number(process)),
                ("refused", Value::Number(self.strangers)),
            ];
            self.log
                .warn("messages of a process that is not the program's are refused", &fields);
        }
    }

    /// Descriptors came that this process may not open: it has as many as it may have.
    fn lose(&mut self, name: &str) {
        self.lost = self.lost.saturating_add(1);
        let fields = [
            ("name", name.into()),
            ("kept", self.store.len().into()),
            ("lost", Value::Number(self.lost)),
        ];
        self.log.error(
            "a descriptor that should be kept is lost: the keeper has as many open as it may",
            &fields,
        );
    }

    fn message(&mut self, bytes: &[u8], descriptors: Vec<OwnedFd>, lost: bool) {
        let message = Message::parse(bytes);
        if message.barrier {
            // Closing what came with it is the answer, and everything before it is done.
            return;
        }
        // One or the other, as with systemd.
        if message.remove {
            match message.name {
                Some(name) => drop(self.store.remove(name)),
                None => self.refuse("descriptors without a usable name cannot be removed", UNNAMED),
            }
        } else if message.store {
            let name = message.name.unwrap_or(UNNAMED);
            if lost {
                self.lose(name);
            }
            for descriptor in descriptors {
                if let Err(error) = self.store.add(name, descriptor) {
                    self.not_kept(name, &error);
                }
            }
        }
        if message.ready {
            if let Some(child) = &mut self.child {
                child.ready = true;
            }
            self.tell("READY=1");
        }
        if let Some(status) = message.status {
            self.tell(&format!("STATUS={status}"));
        }
    }

    fn not_kept(&mut self, name: &str, error: &StoreError) {
        self.refuse(&format!("a descriptor is not kept: {error}"), name);
    }

    fn refuse(&mut self, message: &str, name: &str) {
        self.refused = self.refused.saturating_add(1);
        if self.refused.is_power_of_two() {
            let fields = [
                ("name", name.into()),
                ("kept", self.store.len().into()),
                ("refused", Value::Number(self.refused)),
            ];
            self.log.error(message, &fields);
        }
    }

    /// Tells whoever supervises the keeper. The program's `STOPPING=1` is not told: it says so too when it is started
    /// anew, and systemd kills a service that said it and stays.
    pub(super) fn tell(&mut self, state: &str) {
        if let Some(outer) = &self.outer
            && let Err(error) = outer.send_at_once(state.as_bytes())
        {
            let error = error.to_string();
            let fields = [("state", state.into()), ("error", error.as_str().into())];
            self.log.warn("the service manager is not notified", &fields);
        }
    }
}
