//! The system calls that need unsafe code.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use rustix::net::sockopt::set_socket_linger;
use rustix::process::Pid;

/// Most descriptors in one message; the kernel's.
const DESCRIPTORS_LIMIT: usize = 253;

/// `fcntl` command (Linux 6.10) that says whether two descriptors are one open file.
const F_DUPFD_QUERY: libc::c_int = 1024 + 3;

/// Signals that the keeper reads from its descriptor.
const SIGNALS: [libc::c_int; 5] = [libc::SIGCHLD, libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGUSR1];

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

pub(crate) fn take_over(inherited: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved; a number that is no descriptor gives an error.
    #[expect(unsafe_code, reason = "rustix takes only descriptors that are known to be open")]
    let flags = check(unsafe { libc::fcntl(inherited, libc::F_GETFD) })?;
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is this process's own"));
    }
    // SAFETY: as above.
    #[expect(unsafe_code, reason = "rustix takes only descriptors that are known to be open")]
    check(unsafe { libc::fcntl(inherited, libc::F_SETFD, flags | libc::FD_CLOEXEC) })?;
    // SAFETY: it is open and was left to this program, and nobody else here has it: the flag would show it.
    #[expect(unsafe_code, reason = "the descriptor is only a number until here")]
    Ok(unsafe { OwnedFd::from_raw_fd(inherited) })
}

/// Whether the kernel says that both are the same open file. One that cannot tell (before Linux 6.10 it has to be built
/// with kcmp, and filters may forbid that) says no: to keep something twice does less harm than to lose it.
pub(crate) fn is_same_file(one: &OwnedFd, other: &OwnedFd) -> bool {
    let (one, other) = (one.as_raw_fd(), other.as_raw_fd());
    // SAFETY: two open descriptors, no memory.
    #[expect(unsafe_code, reason = "rustix has no such call")]
    let asked = unsafe { libc::fcntl(one, F_DUPFD_QUERY, other) };
    if asked >= 0 {
        return asked == 1;
    }
    let process = std::process::id();
    // SAFETY: as above; the 0 is KCMP_FILE.
    #[expect(unsafe_code, reason = "rustix has no such call")]
    let asked = unsafe { libc::syscall(libc::SYS_kcmp, process, process, 0, one, other) };
    asked == 0
}

/// A descriptor that the keeper's signals are read from; from here on they do nothing else. Those that were pending or
/// ignored before are not lost to it.
pub(crate) fn signals() -> io::Result<OwnedFd> {
    let (set, all) = (signal_set(&SIGNALS), every_signal());
    // SAFETY: the set is initialised; the handlers are constants.
    #[expect(unsafe_code, reason = "rustix has no signal handling")]
    unsafe {
        check(libc::sigprocmask(
            libc::SIG_SETMASK,
            &raw const all,
            std::ptr::null_mut(),
        ))?;
        for signal in SIGNALS {
            libc::signal(signal, libc::SIG_DFL);
        }
        let descriptor = check(libc::signalfd(
            -1,
            &raw const set,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ))?;
        Ok(OwnedFd::from_raw_fd(descriptor))
    }
}

/// The next signal, if there is one.
pub(crate) fn next_signal(signals: &OwnedFd) -> Option<libc::c_int> {
    let mut buffer = [0_u8; size_of::<libc::signalfd_siginfo>()];
    let read = rustix::io::read(signals, &mut buffer).ok()?;
    // The number is the first field.
    let number = buffer.first_chunk().filter(|_| read == buffer.len())?;
    libc::c_int::try_from(u32::from_ne_bytes(*number)).ok()
}

/// All signals: any other would end or stop the process, and with it what is kept. SIGKILL and SIGSTOP cannot be blocked.
fn every_signal() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the call initialises the set.
    #[expect(unsafe_code, reason = "rustix has no signal handling")]
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        set.assume_init()
    }
}

fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the first call initialises the set, the others add numbers of real signals.
    #[expect(unsafe_code, reason = "rustix has no signal handling")]
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// Makes a child process; `None` in it.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the keeper has one thread, so the child has everything that the parent had.
    #[expect(unsafe_code, reason = "the standard library lets a child do less before exec")]
    Ok(Pid::from_raw(check(unsafe { libc::fork() })?))
}

/// What only the new process does before it becomes another program: usual signals, and the descriptors `sources` as
/// `first` and following. All others from there on are closed by exec.
pub(crate) fn prepare_child(first: RawFd, sources: &mut [RawFd]) -> io::Result<()> {
    let after = RawFd::try_from(sources.len())
        .ok()
        .and_then(|count| first.checked_add(count));
    let after = after.ok_or(io::ErrorKind::InvalidInput)?;
    let none = signal_set(&[]);
    // SAFETY: descriptors are numbers here, and whose they were does not matter to a program that is about to be replaced.
    #[expect(unsafe_code, reason = "rustix has no signals, and its descriptors have owners")]
    unsafe {
        check(libc::sigprocmask(
            libc::SIG_SETMASK,
            &raw const none,
            std::ptr::null_mut(),
        ))?;
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        // What is in the way of another one is moved first.
        for source in sources.iter_mut().filter(|source| (first..after).contains(*source)) {
            *source = check(libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, after))?;
        }
        for (target, source) in (first..).zip(sources.iter()) {
            check(libc::dup2(*source, target))?;
        }
        // Before Linux 5.11 there is no such call; then only what others left without the flag gets through.
        let rest = libc::c_uint::try_from(after).unwrap_or(libc::c_uint::MAX);
        libc::syscall(
            libc::SYS_close_range,
            rest,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
    }
    Ok(())
}

/// Becomes another program; returns only why that failed. A name without a slash is looked for in `PATH`.
pub(crate) fn exec(program: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: three valid texts or lists of texts, ended by a null pointer, that live until the call is over.
    #[expect(unsafe_code, reason = "the standard library's exec does more than this")]
    unsafe {
        libc::execvpe(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
    }
    io::Error::last_os_error()
}

/// Becomes the program that is open as `program`; returns only why that failed. No interpreter is looked for.
pub(crate) fn exec_open(program: BorrowedFd<'_>, arguments: &[CString], environment: &[CString]) -> io::Error {
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: an empty text and two lists of texts, ended by a null pointer, that live until the call is over.
    #[expect(unsafe_code, reason = "the standard library executes nothing that is open")]
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

/// What exec wants: pointers to texts, ended by none.
fn pointers(texts: &[CString]) -> Vec<*const libc::c_char> {
    let pointers = texts.iter().map(|text| text.as_ptr());
    pointers.chain([std::ptr::null()]).collect()
}

/// Ends the process at once, without what the parent would do at its end.
pub(crate) fn exit_now(code: libc::c_int) -> ! {
    // SAFETY: it does not return.
    #[expect(unsafe_code, reason = "the standard library's exit runs the parent's handlers")]
    unsafe {
        libc::_exit(code)
    }
}

/// Who sent a message, as the kernel says; the process is 0 where it is not visible from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sender {
    pub(crate) process: i32,
    pub(crate) user: u32,
}

/// One message that was received.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) length: usize,
    /// It was longer than the buffer.
    pub(crate) cut: bool,
    /// More descriptors came with it than could be opened.
    pub(crate) lost: bool,
    pub(crate) sender: Option<Sender>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Control messages have to begin where a `cmsghdr` may.
#[repr(align(8))]
struct Control([u8; CONTROL]);

/// Room for a sender and for as many descriptors as there may be.
const CONTROL: usize = 64 + DESCRIPTORS_LIMIT * size_of::<RawFd>();

/// Room for a sender alone, which the kernel writes before descriptors.
const SENDER_ONLY: usize = size_of::<libc::cmsghdr>() + size_of::<libc::ucred>().next_multiple_of(size_of::<usize>());

/// Who sent the next message, which stays where it is; its descriptors are not opened.
pub(crate) fn peek_sender(socket: BorrowedFd<'_>) -> io::Result<Option<Sender>> {
    Ok(receive_with(socket, &mut [], SENDER_ONLY, libc::MSG_PEEK)?.sender)
}

/// Takes the next message out; with `descriptors` or without opening them.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], descriptors: bool) -> io::Result<Received> {
    receive_with(socket, buffer, if descriptors { CONTROL } else { 0 }, 0)
}

fn receive_with(socket: BorrowedFd<'_>, buffer: &mut [u8], room: usize, flags: libc::c_int) -> io::Result<Received> {
    let mut control = Control([0; CONTROL]);
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a header of zeros is an empty one.
    #[expect(unsafe_code, reason = "its padding differs between C libraries")]
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = room.min(CONTROL);
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header points to buffers that live longer than the call, with their lengths.
    #[expect(unsafe_code, reason = "rustix takes no sender without a process number")]
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let mut received = Received {
        length,
        cut: header.msg_flags & libc::MSG_TRUNC != 0,
        lost: header.msg_flags & libc::MSG_CTRUNC != 0,
        sender: None,
        descriptors: Vec::new(),
    };
    // SAFETY: the kernel wrote the control messages that the header tells of, and the macros stay within its length.
    #[expect(unsafe_code, reason = "control messages are walked through by pointers")]
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(found) = next.as_ref() {
            let data = libc::CMSG_DATA(found);
            let length = found.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
            match (found.cmsg_level, found.cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length >= size_of::<libc::ucred>() => {
                    let credentials = data.cast::<libc::ucred>().read_unaligned();
                    received.sender = Some(Sender {
                        process: credentials.pid,
                        user: credentials.uid,
                    });
                }
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for index in 0..length / size_of::<RawFd>() {
                        let number = data.cast::<RawFd>().add(index).read_unaligned();
                        received.descriptors.push(OwnedFd::from_raw_fd(number));
                    }
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(&raw const header, found);
        }
    }
    for descriptor in &received.descriptors {
        // Whoever closes the last reference to a socket waits for what it has not sent, if its owner wants that. What is no
        // socket gives an error, which is as good.
        let _ = set_socket_linger(descriptor, None);
    }
    Ok(received)
}

/// A number that nobody can guess.
pub(crate) fn random() -> io::Result<u128> {
    let mut bytes = [0_u8; 16];
    // SAFETY: the buffer has the length that is given.
    #[expect(unsafe_code, reason = "the feature of rustix that has it is not used otherwise")]
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(filled) == Ok(bytes.len()) {
        Ok(u128::from_ne_bytes(bytes))
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A group of the kind that the daemons have kept.
#[cfg(test)]
pub(crate) fn fanotify_group() -> io::Result<OwnedFd> {
    // SAFETY: plain numbers in; a descriptor that nobody else knows, or -1, out.
    #[expect(unsafe_code, reason = "rustix has no such call")]
    unsafe {
        let group = check(libc::fanotify_init(libc::FAN_CLASS_PRE_CONTENT | libc::FAN_CLOEXEC, 0))?;
        Ok(OwnedFd::from_raw_fd(group))
    }
}
