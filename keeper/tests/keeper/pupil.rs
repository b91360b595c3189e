//! The program that the keeper supervises in these tests: this very test binary, which does what the test tells it over a
//! socket. It speaks to the keeper with the client that the daemons use.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hullspeed_daemon::activation::{Announced, Inherited};
use hullspeed_daemon::fdstore::Store;
use hullspeed_keeper::notification::{Address, Sender};
use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::process::{Signal, getpid, kill_process};

/// Variable with the path of the test's socket.
pub(crate) const SOCKET: &str = "HULLSPEED_TEST_PUPIL";

/// How a pupil is started.
pub(crate) fn command() -> Vec<OsString> {
    let program = std::env::current_exe().unwrap().into_os_string();
    let arguments = ["pupil", "--exact", "--ignored", "--nocapture", "--quiet"];
    std::iter::once(program).chain(arguments.map(OsString::from)).collect()
}

/// Does what it is told, if it is told anything.
pub(crate) fn run() {
    let Some(path) = std::env::var_os(SOCKET) else {
        return;
    };
    let mut pupil = Pupil::new();
    let stream = UnixStream::connect(path).unwrap();
    writeln!(&stream, "{}", pupil.report()).unwrap();
    for line in BufReader::new(stream.try_clone().unwrap()).lines() {
        let Ok(line) = line else { break };
        let answer = pupil.obey(&line);
        writeln!(
            &stream,
            "{}",
            answer.unwrap_or_else(|error| format!("{:?}", error.kind()))
        )
        .unwrap();
    }
}

struct Pupil {
    inherited: Inherited,
    store: Store,
    own: Vec<OwnedFd>,
}

impl Pupil {
    fn new() -> Self {
        let inherited = Inherited::take(&Announced::to_this_process()).unwrap();
        let store = Store::from_environment().unwrap();
        store.note(&inherited);
        Self {
            inherited,
            store,
            own: Vec::new(),
        }
    }

    /// Process, capacity, socket, names of listeners, names and inodes of what was kept.
    fn report(&mut self) -> String {
        let listeners: Vec<_> = self.inherited.left().map(str::to_owned).collect();
        let names: Vec<_> = self.inherited.kept_names().map(str::to_owned).collect();
        let kept = names.into_iter().map(|name| {
            let descriptor = self.inherited.take_kept(&name).unwrap();
            let inode = fstat(&descriptor).unwrap().st_ino;
            self.own.push(descriptor);
            format!("{name}={inode}")
        });
        let kept = kept.collect::<Vec<_>>().join(",");
        let socket = std::env::var("NOTIFY_SOCKET").unwrap();
        let process = getpid().as_raw_pid();
        format!(
            "{process} {} {socket} [{}] [{kept}]",
            self.store.capacity(),
            listeners.join(",")
        )
    }

    fn obey(&mut self, line: &str) -> std::io::Result<String> {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        match verb {
            "keep" => return self.keep(rest),
            "keep-and-die" => {
                self.keep(rest)?;
                kill_process(getpid(), Signal::KILL)?;
            }
            // What a client without accounts would do.
            "force" => {
                let socket = std::env::var_os("NOTIFY_SOCKET").unwrap();
                let careless = Store::new(OsStr::new(&socket), 1 << 20)?.unwrap();
                careless.keep(rest, self.memory()?.as_fd())?;
            }
            "linger" => self.linger(rest)?,
            "again" => self.store.keep(rest, self.own.first().unwrap().as_fd())?,
            "forget" => self.store.forget(rest)?,
            "barrier" => self.store.barrier(Duration::from_millis(rest.parse().unwrap()))?,
            "say" => hullspeed_daemon::notify::send(&rest.replace('|', "\n")),
            "exit" => std::process::exit(rest.parse().unwrap()),
            _ => panic!("{line}"),
        }
        Ok("ok".to_owned())
    }

    /// Sends the last reference to a TCP socket whose close waits: its peer takes nothing, and it has more to send.
    fn linger(&mut self, message: &str) -> std::io::Result<()> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let stream = std::net::TcpStream::connect(listener.local_addr()?)?;
        self.own.push(listener.accept()?.0.into());
        stream.set_nonblocking(true)?;
        while (&stream).write(&[0; 1 << 16]).is_ok() {}
        stream.set_nonblocking(false)?;
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::from_secs(600)))?;
        let socket = std::env::var_os("NOTIFY_SOCKET").unwrap();
        let sender = Sender::new(Address::parse(&socket)?)?;
        sender.send(message.replace('|', "\n").as_bytes(), Some(stream.as_fd()))?;
        // Closing it here would wait.
        rustix::net::sockopt::set_socket_linger(self.own.last().unwrap(), None)?;
        Ok(())
    }

    fn memory(&mut self) -> std::io::Result<OwnedFd> {
        let memory = memfd_create("pupil", MemfdFlags::CLOEXEC)?;
        self.own.push(memory.try_clone()?);
        Ok(memory)
    }

    fn keep(&mut self, name: &str) -> std::io::Result<String> {
        let memory = self.memory()?;
        self.store.keep(name, memory.as_fd())?;
        Ok(format!("{name}={}", fstat(&memory)?.st_ino))
    }
}
