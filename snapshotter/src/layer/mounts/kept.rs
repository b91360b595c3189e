//! Descriptors that outlive this process, and their names in the store.
//!
//! | name | descriptor |
//! |---|---|
//! | `journal` | the memory with the [`Journal`] of events |
//! | `fanotify-<layer>` | the group of a layer that is mounted natively and not complete |
//! | `data-<layer>` | its `data`, as it was opened before the group's mark |
//! | `fuse-<layer>-<state>` | `/dev/fuse` of a layer's session; `<state>` is what the next process has to know of it |
//! | `modes-<layer>-<minor>` | how each file was opened in the session of that device |
//!
//! `<layer>` is the first half of the TOC digest: a store has to tell all names in one variable, and 128 bits are no other layer's.
//!
//! [`Journal`]: crate::layer::native::journal::Journal

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use estargz::digest::Digest;
use fuse_session::{DeviceNumber, Negotiated};
use hullspeed_daemon::activation::Inherited;
use hullspeed_daemon::fdstore::Store;

use crate::layer::cache::Inherited as LayerInherited;
use crate::layer::fault;
use crate::layer::native::group::Group;
use crate::layer::report::StoreReport;

const JOURNAL: &str = "journal";
const GROUP: &str = "fanotify";
const DATA: &str = "data";
const FUSE: &str = "fuse";
const MODES: &str = "modes";
/// Digits of a layer's digest in a name.
const LAYER_DIGITS: usize = 32;
/// How long the store may take to forget what it could not be told to before.
const FORGET_LIMIT: Duration = Duration::from_secs(10);

/// A kept connection of FUSE.
#[derive(Debug)]
pub struct KeptSession {
    /// The descriptor.
    pub device: OwnedFd,
    /// The mount's device.
    pub number: DeviceNumber,
    /// What kernel and predecessor agreed on.
    pub negotiated: Negotiated,
    /// Its name in the store.
    pub name: String,
    /// What tells it from all others that there were.
    pub key: SessionKey,
}

/// Tells a session from all others of its layer since the machine was booted: connections' numbers come again, and what is said of a name must not be of another
/// session's descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionKey(u64);

impl SessionKey {
    fn modes_name(self, layer: &str) -> String {
        format!("{MODES}-{layer}-{:x}", self.0)
    }

    /// Of a session that is new.
    pub fn of_new() -> Self {
        // No two sessions of one layer are made in the same nanosecond: mounting one takes longer.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self(
            now.tv_sec
                .cast_unsigned()
                .wrapping_mul(1_000_000_000)
                .wrapping_add(now.tv_nsec.cast_unsigned()),
        )
    }
}

/// What is kept of a layer.
#[derive(Debug, Default)]
pub struct KeptLayer {
    /// Of a native mount.
    pub group: Option<Group>,
    /// Of a native mount.
    pub data: Option<File>,
    /// How each file was opened, by the key of the session.
    modes: Vec<(SessionKey, OwnedFd)>,
    /// Device and inode of that, once it has been taken.
    pub data_identity: Option<(u64, u64)>,
    /// Of mounts by FUSE; of several, where another one has taken the place of the first.
    pub sessions: Vec<KeptSession>,
}

/// What came back from the store, and the store itself.
#[derive(Debug, Clone, Default)]
pub struct Descriptors {
    store: Option<Arc<Store>>,
    kept: Arc<Mutex<Kept>>,
}

#[derive(Debug, Default)]
struct Kept {
    journal: Option<OwnedFd>,
    layers: HashMap<String, KeptLayer>,
    /// What is of no use and must not be closed.
    spare: Vec<OwnedFd>,
    /// Names of groups that the store has.
    native: HashSet<String>,
    /// Names under which the store may have what it was to forget: it could not be told.
    doubtful: HashSet<String>,
}

impl KeptLayer {
    /// How files were opened in the session of this device.
    pub fn take_modes(&mut self, session: SessionKey) -> Option<OwnedFd> {
        let found = self.modes.iter().position(|(key, _)| *key == session)?;
        Some(self.modes.swap_remove(found).1)
    }
}

impl Descriptors {
    /// Takes over what an earlier process left; what is of no use to this one is given back.
    pub fn new(store: Option<Store>, inherited: &mut Inherited) -> Self {
        if let Some(store) = &store {
            store.note(inherited);
        }
        let descriptors = Self {
            store: store.map(Arc::new),
            kept: Arc::default(),
        };
        let names: Vec<String> = inherited.kept_names().map(ToOwned::to_owned).collect();
        for name in names {
            let Some(descriptor) = inherited.take_kept(&name) else {
                continue;
            };
            if !descriptors.take(&name, descriptor) {
                tracing::warn!(name, "a kept descriptor is of no use here and is given back");
                descriptors.forget(&name);
            }
        }
        descriptors.forget_modes_alone();
        descriptors
    }

    /// A predecessor may have been killed between the two messages that keep a session, or the two that give it back.
    fn forget_modes_alone(&self) {
        let mut alone = Vec::new();
        for (layer, kept) in &mut self.lock().layers {
            let sessions = &kept.sessions;
            let left = kept
                .modes
                .extract_if(.., |(key, _)| sessions.iter().all(|session| session.key != *key));
            alone.extend(left.map(|(key, _)| key.modes_name(layer)));
        }
        alone.iter().for_each(|name| self.forget(name));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        // Every change is one insert or remove.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, name: &str, descriptor: OwnedFd) -> bool {
        let mut kept = self.lock();
        let kept = &mut *kept;
        if name == JOURNAL {
            // A second one stays as well: to forget the name would be to lose both.
            match &kept.journal {
                None => kept.journal = Some(descriptor),
                Some(_) => kept.spare.push(descriptor),
            }
            return true;
        }
        let mut parts = name.splitn(3, '-');
        let (Some(kind), Some(layer)) = (parts.next(), parts.next()) else {
            return false;
        };
        let is_layer = layer.len() == LAYER_DIGITS && layer.bytes().all(|digit| digit.is_ascii_hexdigit());
        if !is_layer || ![GROUP, DATA, FUSE, MODES].contains(&kind) {
            return false;
        }
        let state = parts.next();
        let layer = kept.layers.entry(layer.to_owned()).or_default();
        match (kind, state) {
            // A second one is nobody's that is known; as long as it is open nobody is allowed anything by its end.
            (GROUP, None) if layer.group.is_some() || !is_group(&descriptor) => {
                kept.spare.push(descriptor);
                true
            }
            (GROUP, None) => {
                kept.native.insert(name.to_owned());
                layer.group.replace(Group::kept(descriptor)).is_none()
            }
            (DATA, None) if layer.data.is_some() => {
                kept.spare.push(descriptor);
                true
            }
            (DATA, None) if !is_writable(&descriptor) => false,
            (DATA, None) => layer.data.replace(File::from(descriptor)).is_none(),
            (MODES, Some(key)) => {
                let Ok(key) = u64::from_str_radix(key, 16) else {
                    return false;
                };
                layer.modes.push((SessionKey(key), descriptor));
                true
            }
            (FUSE, Some(state)) => {
                let Some((key, number, negotiated)) = session_state(state) else {
                    return false;
                };
                let session = KeptSession {
                    device: descriptor,
                    number,
                    negotiated,
                    name: name.to_owned(),
                    key,
                };
                layer.sessions.push(session);
                true
            }
            _ => false,
        }
    }

    /// Whether there is a store, without which nothing outlives this process.
    pub fn has_store(&self) -> bool {
        self.store.is_some()
    }

    /// How the store is; none where there is none.
    pub fn report(&self) -> Option<StoreReport> {
        self.store.as_ref().map(|store| StoreReport {
            capacity: store.capacity(),
            kept: store.len(),
        })
    }

    /// The journal that an earlier process left.
    pub fn take_journal(&self) -> Option<OwnedFd> {
        self.lock().journal.take()
    }

    /// What is kept of a layer; once.
    pub fn take_layer(&self, layer: &Digest) -> Option<KeptLayer> {
        self.lock().layers.remove(&short(layer))
    }

    /// What the directory of a layer is to know of its mount.
    pub fn inherited(&self, layer: &Digest) -> LayerInherited {
        let mut useless = false;
        let inherited = self.with_layer(layer, |kept| match (&kept.group, kept.data.take()) {
            (Some(_), Some(data)) => {
                kept.data_identity = data.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()));
                LayerInherited::ReadByKernel(data)
            }
            (Some(_), None) => {
                tracing::error!(toc = %layer, "a layer's group was kept without its data; what is read of it is an error");
                LayerInherited::Unusable
            }
            (None, data) => {
                useless = data.is_some();
                if kept.sessions.is_empty() {
                    LayerInherited::Nothing
                } else {
                    LayerInherited::Mount
                }
            }
        });
        if useless {
            let [_, data] = native_names(layer);
            self.forget(&data);
        }
        inherited.unwrap_or(LayerInherited::Nothing)
    }

    /// Whether something is kept of native mounts.
    pub fn has_native(&self) -> bool {
        self.lock().layers.values().any(|kept| kept.group.is_some())
    }

    /// Takes all that is kept of native mounts and was not taken. Names have but half of a digest: `layers` and `noted` are those that it
    /// may be; of one that is none of them there is only a name.
    pub fn take_native(&self, layers: impl IntoIterator<Item = Digest>) -> Vec<(Digest, KeptLayer)> {
        let known: HashMap<String, Digest> = layers.into_iter().map(|layer| (short(&layer), layer)).collect();
        let mut kept = self.lock();
        let named = kept.layers.iter_mut().filter_map(|(name, kept)| {
            // Sessions of the layer stay for those who look for them.
            let native = KeptLayer {
                group: Some(kept.group.take()?),
                data: kept.data.take(),
                data_identity: kept.data_identity,
                ..KeptLayer::default()
            };
            let layer = known.get(name).copied();
            Some((layer.unwrap_or_else(|| Digest::of(name.as_bytes())), native))
        });
        named.collect()
    }

    /// Takes the sessions of layers of which there is no more than a part of a name: neither a directory nor a snapshot.
    pub fn take_nameless(&self) -> Vec<KeptSession> {
        let rest = std::mem::take(&mut self.lock().layers);
        let mut sessions = Vec::new();
        for (layer, kept) in rest {
            let modes = kept.modes.iter().map(|(key, _)| key.modes_name(&layer));
            let data = kept.data.is_some().then(|| format!("{DATA}-{layer}"));
            modes.chain(data).for_each(|name| self.forget(&name));
            sessions.extend(kept.sessions);
        }
        sessions
    }

    /// Looks at what is kept of a layer.
    pub fn with_layer<T>(&self, layer: &Digest, look: impl FnOnce(&mut KeptLayer) -> T) -> Option<T> {
        self.lock().layers.get_mut(&short(layer)).map(look)
    }

    /// Layers of which something is kept and not taken.
    pub fn layers(&self) -> usize {
        self.lock().layers.len()
    }

    /// Keeps the journal.
    pub fn keep_journal(&self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.keep(JOURNAL, descriptor)
    }

    /// Keeps what a native mount depends on.
    pub fn keep_native(&self, layer: &Digest, group: BorrowedFd<'_>, data: BorrowedFd<'_>) -> io::Result<()> {
        let [group_name, data_name] = native_names(layer);
        // A store gives back both of one name, and nobody could tell which is which.
        if self.lock().native.contains(&group_name) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a group of the layer is kept already",
            ));
        }
        // In this order: of a layer whose group is there, there is the data too.
        self.keep(&data_name, data)?;
        fault::point("native-half-kept");
        self.keep(&group_name, group).inspect_err(|_| self.forget(&data_name))?;
        self.lock().native.insert(group_name);
        Ok(())
    }

    /// A native mount needs nothing any more.
    pub fn forget_native(&self, layer: &Digest) {
        for name in native_names(layer) {
            self.forget(&name);
            self.lock().native.remove(&name);
        }
    }

    /// Keeps the descriptor of a session; its name in the store, `None` where there is no store.
    pub fn keep_session(
        &self,
        layer: &Digest,
        key: SessionKey,
        device: BorrowedFd<'_>,
        (number, negotiated): (DeviceNumber, &Negotiated),
    ) -> io::Result<Option<String>> {
        if self.store.is_none() {
            return Ok(None);
        }
        let mut state = key.0.to_le_bytes().to_vec();
        state.extend(number.to_bytes());
        state.extend(negotiated.to_bytes());
        let name = format!("{FUSE}-{}-{}", short(layer), URL_SAFE_NO_PAD.encode(state));
        self.keep(&name, device)?;
        Ok(Some(name))
    }

    /// Keeps how files are opened in a session; its name in the store.
    pub fn keep_modes(&self, layer: &Digest, key: SessionKey, modes: BorrowedFd<'_>) -> io::Result<String> {
        let name = Self::modes_name(layer, key);
        self.keep(&name, modes)?;
        Ok(name)
    }

    /// What the modes of a session are called in the store.
    pub fn modes_name(layer: &Digest, session: SessionKey) -> String {
        session.modes_name(&short(layer))
    }

    /// Gives a kept descriptor back. That it cannot be told costs room in the store, until something is kept under that name.
    pub fn forget(&self, name: &str) {
        let Some(store) = &self.store else { return };
        if let Err(error) = store.forget(name) {
            tracing::warn!(name, %error, "the descriptor store keeps what is not needed any more");
            self.lock().doubtful.insert(name.to_owned());
        }
    }

    fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let store = self.store.as_ref();
        let store = store.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no descriptor store"))?;
        if self.lock().doubtful.contains(name) {
            // The store would give back both, the old one first.
            store.forget(name)?;
            store.barrier(FORGET_LIMIT)?;
            self.lock().doubtful.remove(name);
        }
        store.keep(name, descriptor)
    }
}

/// Whether a descriptor is of a fanotify group: answers are written to it.
fn is_group(descriptor: &OwnedFd) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    link.is_ok_and(|link| link.as_os_str() == "anon_inode:[fanotify]")
}

fn is_writable(descriptor: &OwnedFd) -> bool {
    use rustix::fs::OFlags;
    rustix::fs::fcntl_getfl(descriptor).is_ok_and(|flags| flags & OFlags::RWMODE == OFlags::RDWR)
}

fn short(layer: &Digest) -> String {
    layer.hex().chars().take(LAYER_DIGITS).collect()
}

fn native_names(layer: &Digest) -> [String; 2] {
    [GROUP, DATA].map(|kind| format!("{kind}-{}", short(layer)))
}

fn session_state(text: &str) -> Option<(SessionKey, DeviceNumber, Negotiated)> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    let (key, rest) = bytes.split_first_chunk()?;
    let (number, negotiated) = rest.split_at_checked(DeviceNumber::STORED_BYTES)?;
    let key = SessionKey(u64::from_le_bytes(*key));
    Some((
        key,
        DeviceNumber::from_bytes(number)?,
        Negotiated::from_bytes(negotiated)?,
    ))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use hullspeed_daemon::activation::Announced;

    use super::*;

    fn empty() -> Descriptors {
        Descriptors::new(None, &mut Inherited::take(&Announced::default()).unwrap())
    }

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[test]
    fn names_tell_what_a_descriptor_is_of() {
        let (layer, other) = (Digest::of(b"layer"), Digest::of(b"other"));
        let descriptors = empty();
        let [group, data] = native_names(&layer);
        assert!(data.len() < 48 && group.len() < 48);
        assert!(descriptors.take(&data, file()));
        assert!(descriptors.take(JOURNAL, file()));
        let own = Group::new().map(|group| group.as_fd().try_clone_to_owned().unwrap());
        // Without root there is no group, and what is none is put aside.
        let is_root = own.is_ok();
        assert!(descriptors.take(&group, own.unwrap_or_else(|_| file())));
        assert_eq!(descriptors.has_native(), is_root);
        assert!(descriptors.with_layer(&other, |_| ()).is_none());
        assert!(descriptors.take_journal().is_some() && descriptors.take_journal().is_none());
        if is_root {
            let inherited = descriptors.inherited(&layer);
            assert!(matches!(inherited, LayerInherited::ReadByKernel(_)));
            let taken = descriptors.take_native([other, layer]);
            assert!(taken.len() == 1 && taken[0].0 == layer && taken[0].1.group.is_some());
        }
    }

    #[test]
    fn a_second_journal_is_put_aside() {
        use std::os::fd::AsRawFd as _;

        let descriptors = empty();
        let (first, second) = (file(), file());
        let number = first.as_raw_fd();
        // Neither is given back.
        assert!(descriptors.take(JOURNAL, first) && descriptors.take(JOURNAL, second));
        assert_eq!(descriptors.lock().spare.len(), 1);
        assert_eq!(descriptors.take_journal().unwrap().as_raw_fd(), number);
    }

    #[test]
    fn sessions_of_layers_of_which_only_half_a_name_is_known_are_found() {
        let descriptors = empty();
        let short = short(&Digest::of(b"gone"));
        let number = DeviceNumber { major: 0, minor: 71 };
        // Form 1 of a stored handshake, and in it the kernel's answer of 64 bytes, which begins with the protocol's number.
        let mut negotiated = [0; 80];
        (negotiated[0], negotiated[16]) = (1, 7);
        let state = [&[9; 8][..], &number.to_bytes(), &negotiated].concat();
        let name = format!("fuse-{short}-{}", URL_SAFE_NO_PAD.encode(state));
        assert!(descriptors.take(&name, file()));
        assert!(descriptors.take(&format!("modes-{short}-909090909090909"), file()));
        assert!(descriptors.take(&format!("modes-{short}-71"), file()));
        // What no session belongs to is of no use.
        descriptors.forget_modes_alone();
        assert_eq!(descriptors.lock().layers[&short].modes.len(), 1);
        let sessions = descriptors.take_nameless();
        assert!(sessions.len() == 1 && sessions[0].name == name && sessions[0].number == number);
        assert!(descriptors.take_nameless().is_empty() && descriptors.layers() == 0);
    }

    #[test]
    fn what_the_store_could_not_be_told_to_forget_is_forgotten_before_the_name_is_used_again() {
        use std::os::unix::net::UnixDatagram;

        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let store = Store::new(path.as_os_str(), 16).unwrap();
        let descriptors = Descriptors::new(store, &mut Inherited::take(&Announced::default()).unwrap());
        let layer = Digest::of(b"layer");
        let keep = || descriptors.keep_native(&layer, file().as_fd(), file().as_fd());
        keep().unwrap();
        let [group, data] = native_names(&layer);
        let heard = |socket: &UnixDatagram| {
            let mut buffer = [0; 4096];
            let length = socket.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert!(heard(&socket).starts_with("FDSTORE=1") && heard(&socket).starts_with("FDSTORE=1"));
        // Nobody hears it, and nothing is kept under the name as long as that is so.
        drop(socket);
        descriptors.forget_native(&layer);
        keep().unwrap_err();
        std::fs::remove_file(&path).unwrap();
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(FORGET_LIMIT)).unwrap();
        let supervisor = std::thread::spawn(move || {
            let heard = std::iter::repeat_with(|| heard(&socket)).take(6).collect::<Vec<_>>();
            (heard, socket)
        });
        keep().unwrap();
        let (heard, socket) = supervisor.join().unwrap();
        let expected = [data, group].map(|name| {
            [
                format!("FDSTOREREMOVE=1\nFDNAME={name}"),
                "BARRIER=1".to_owned(),
                format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}"),
            ]
        });
        assert_eq!(heard, expected.concat());
        // Once is enough.
        descriptors.forget_native(&layer);
        keep().unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut messages = 0;
        while socket.recv(&mut [0; 4096]).is_ok() {
            messages += 1;
        }
        assert_eq!(messages, 4);
    }

    #[test]
    fn what_is_not_known_is_given_back() {
        let descriptors = empty();
        let short = short(&Digest::of(b"layer"));
        for name in [
            "stored",
            "data-",
            "data-../../etc",
            "journals",
            &format!("data-{short}-more"),
            &format!("mount-{short}"),
            &format!("fuse-{short}"),
            &format!("fuse-{short}-"),
            &format!("fuse-{short}-AAAA"),
            &format!("fuse-{short}-!!"),
            &format!("modes-{short}"),
            &format!("modes-{short}-x-"),
            &format!("data-{}", &short[1..]),
        ] {
            assert!(!descriptors.take(name, file()), "{name}");
        }
        // What is there already is not replaced; and what cannot be written to is not a layer's data.
        let data = format!("data-{short}");
        let read_only = OwnedFd::from(File::open("/dev/null").unwrap());
        assert!(!descriptors.take(&data, read_only));
        assert!(descriptors.take(&data, file()));
        // A second one of a name is put aside: to forget the name would be to lose both.
        assert!(descriptors.take(&data, file()));
        assert_eq!(descriptors.lock().spare.len(), 1);
        // What is no group is never written to, nor closed.
        assert!(descriptors.take(&format!("fanotify-{short}"), file()));
        assert!(!descriptors.has_native());
        assert_eq!(descriptors.lock().spare.len(), 2);
    }
}
