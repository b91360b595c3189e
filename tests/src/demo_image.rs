//! The demo's image: Debian with python3, three packages and a small HTTP function, five layers, made by the package
//! tools themselves, so that it has what real images have: bytecode, maintainer scripts' files, deletions across layers,
//! hardlinks, setuid programs, capabilities, device nodes.
//!
//! Package sources are those of the machine's own apt configuration. The image is kept in a cache directory under a key
//! that is the digest of the whole recipe.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::layer_tar;
use crate::layout::{ImageConfig, LayoutImage, LayoutWriter};
use crate::package_source::{self, PackageSource};
use crate::process;
use crate::run::{RunDir, remove_tree};

/// Times of everything that the build itself makes: 2025-01-01. Files from packages keep theirs.
const EPOCH: i64 = 1_735_689_600;

/// To be raised when this file changes what it makes; part of the cache key.
const VERSION: u32 = 1;

/// The whole build takes a minute; a stage that takes longer than this hangs.
const STAGE_LIMIT: Duration = Duration::from_secs(600);

/// The image's name in a layout.
pub const TAG: &str = "plain";

/// Port of the function.
pub const PORT: u16 = 8080;

/// The function's program, relative to the root.
pub const PROGRAM: &str = "srv/function/server.py";

/// The path that is asked for in a cold start: it does the function's real work.
pub const PATH: &str = "/";

const SERVER: &str = include_str!("../image/server.py");
const CONFIG: &str = include_str!("../image/config.yaml");
const PAGE: &str = include_str!("../image/page.html");

/// Run on the fresh base system, outside it. What names this machine or this moment goes; apt's files are kept apart.
const BASE_SCRIPT: &str = r#"
cd "$ROOT"
mv var/lib/apt/lists "$WORK/lists"
mkdir -p "$WORK/archives/partial" var/lib/apt/lists
mv etc/apt/sources.list "$WORK/lists/sources.list"
rm -rf var/cache/apt/* var/log/* var/cache/ldconfig/aux-cache debootstrap
: > etc/apt/sources.list
: > etc/resolv.conf; : > etc/hostname; : > etc/hosts
"#;

const PYTHON_SCRIPT: &str = "apt install python3";

const PACKAGES_SCRIPT: &str = "apt install python3-numpy python3-jinja2 python3-yaml";

/// Deletions: single files, whole directories, and a directory that is made anew (opaque).
const TRIM_SCRIPT: &str = r#"
rm -rf /usr/share/man /usr/share/locale /usr/share/info
rm -rf /usr/share/doc && mkdir /usr/share/doc && echo 'Removed to save space.' > /usr/share/doc/README
rm -rf /usr/lib/python3.11/lib2to3 /usr/lib/python3.11/pydoc_data
find /usr/lib/python3/dist-packages/numpy -type d -name tests -prune -exec rm -rf {} +
"#;

const FUNCTION_SCRIPT: &str = r#"
cd /srv/function
touch -d @$EPOCH *
python3 -m compileall -q .
ln server.py main.py
ln -s server.py current
ln -s /srv/function/server.py /usr/local/bin/serve
install -m 4755 -o root -g daemon /bin/true /usr/local/bin/setuid-example
install -m 2755 -o root -g staff /bin/true /usr/local/bin/setgid-example
install -m 0755 /bin/true /usr/local/bin/capability-example
mknod null-device c 1 3
mkfifo queue
mkdir spool
chmod 666 null-device; chmod 640 queue; chmod 1777 spool
chown -R 65534:65534 spool queue
"#;

/// `apt` of the scripts above.
const APT_FUNCTION: &str = r#"
apt() {
  command=$1; shift
  apt-get -q -y -o APT::Install-Recommends=0 -o Dir::Etc::SourceList=/var/lib/apt/lists/sources.list \
    -o Dir::Etc::SourceParts=/dev/null -o DPkg::Use-Pty=0 "$command" "$@"
}
"#;

/// Leaves no trace of the moment in a layer.
const CLEAN_SCRIPT: &str = r#"
rm -rf /var/log/* /var/cache/apt/*.bin /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old /var/lib/dpkg/*-old /tmp/* /root/.cache
"#;

/// Where the chroot sees apt's files, which are in no layer.
const APT_DIRECTORY: &str = "/var/lib/apt/lists";

/// This machine's certificates of authorities, as Debian has them.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// cap_net_bind_service=ep, as setcap(8) writes it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Where `make demo` keeps the image; tests take it from there.
#[must_use]
pub fn shared_cache() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/demo")
}

/// A built image.
#[derive(Debug, Clone)]
pub struct DemoImage {
    /// Directory of the OCI layout.
    pub layout: PathBuf,
    /// Paths that one start of the function reads, in order, one a line, without a leading slash.
    pub access: PathBuf,
}

impl DemoImage {
    /// The image from `cache`, built first if it is not there. Builders of several processes take turns.
    pub async fn cached(run: &RunDir, cache: &Path) -> Result<Self> {
        fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
        let lock = File::create(cache.join("image.lock")).context("cannot create the image cache's lock")?;
        lock.lock().context("cannot lock the image cache")?;
        let directory = cache.join(format!("image-{}", recipe_key()));
        let image = Self {
            layout: directory.join("oci"),
            access: directory.join("access.txt"),
        };
        if !directory.exists() {
            remove_outdated(cache)?;
            let part = run.directory("image-part")?;
            Build::new(run)?
                .build(&part)
                .await
                .context("cannot build the demo image")?;
            // On one file system this is atomic: a cached image is a whole one.
            if fs::rename(&part, &directory).is_err() {
                process::output(Command::new("cp").arg("-a").arg(&part).arg(&directory))?;
                remove_tree(&part)?;
            }
        }
        Ok(image)
    }

    /// Its manifest and configuration.
    pub fn read(&self) -> Result<LayoutImage> {
        LayoutImage::read(&self.layout, TAG)
    }

    /// How skopeo and `estargz` name it.
    #[must_use]
    pub fn source(&self) -> String {
        format!("oci:{}:{TAG}", self.layout.display())
    }
}

/// Images of older recipes; the lock is held.
fn remove_outdated(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache).context("cannot list the image cache")? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("image-") {
            remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

fn recipe_key() -> String {
    let mut hash = Sha256::new();
    let parts = [
        BASE_SCRIPT,
        PYTHON_SCRIPT,
        PACKAGES_SCRIPT,
        TRIM_SCRIPT,
        FUNCTION_SCRIPT,
        APT_FUNCTION,
        CLEAN_SCRIPT,
    ];
    for part in parts.into_iter().chain([SERVER, CONFIG, PAGE]) {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    hash.update(VERSION.to_le_bytes());
    hex::encode(&hash.finalize()[..8])
}

struct Build<'a> {
    run: &'a RunDir,
    work: PathBuf,
    /// Directories of the finished layers, lowest first.
    layers: Vec<PathBuf>,
    began: i64,
}

impl<'a> Build<'a> {
    fn new(run: &'a RunDir) -> Result<Self> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("a clock before 1970")?;
        let began = i64::try_from(now.as_secs()).context("a clock beyond i64")?;
        Ok(Self {
            run,
            work: run.directory("image-build")?,
            layers: Vec::new(),
            began,
        })
    }

    async fn build(mut self, output: &Path) -> Result<()> {
        self.base()?;
        self.stage("python", PYTHON_SCRIPT, |_| Ok(()))?;
        self.stage("packages", PACKAGES_SCRIPT, |_| Ok(()))?;
        self.stage("trim", TRIM_SCRIPT, |_| Ok(()))?;
        self.stage("function", FUNCTION_SCRIPT, write_function)?;
        self.mark_attributes()?;
        let mut layout = LayoutWriter::create(&output.join("oci"))?;
        for layer in &self.layers {
            layer_tar::clamp_times(layer, self.began, EPOCH)?;
            layout.add_layer(|tar| layer_tar::write(layer, tar))?;
        }
        layout.finish(&image_config(), TAG)?;
        let copy = self.copy_of_merged()?;
        let measured = crate::access::measure(self.run, &copy, &image_config()).await?;
        fs::write(output.join("access.txt"), measured.join("\n") + "\n").context("cannot write the access list")?;
        remove_tree(&self.work)
    }

    /// The lowest layer, by debootstrap.
    fn base(&mut self) -> Result<()> {
        let root = self.work.join("base");
        let PackageSource { uri, suite } = PackageSource::of_machine()?;
        let mut debootstrap = Command::new("debootstrap");
        debootstrap
            .args(["--variant=minbase", &suite])
            .arg(&root)
            .arg(&uri)
            .env("SOURCE_DATE_EPOCH", EPOCH.to_string())
            .envs(package_source::proxy_variables()?);
        self.step("debootstrap", debootstrap)?;
        let mut script = Command::new("sh");
        script
            .args(["-euc", BASE_SCRIPT])
            .env("ROOT", &root)
            .env("WORK", &self.work);
        self.step("base", script)?;
        self.configure_apt()?;
        self.layers.push(root);
        Ok(())
    }

    /// apt's configuration beside the lists, which are in no layer. The base system has no certificates, so those of this
    /// machine do for an archive behind https.
    fn configure_apt(&self) -> Result<()> {
        let lists = self.work.join("lists");
        let mut text = String::new();
        if Path::new(CERTIFICATES).exists() {
            fs::copy(CERTIFICATES, lists.join("certificates.crt")).context("cannot copy the certificates")?;
            text = format!("Acquire::https::CaInfo \"{APT_DIRECTORY}/certificates.crt\";\n");
        }
        fs::write(lists.join("apt.conf"), text).context("cannot write apt's configuration")
    }

    /// One more layer: `prepare` is given the merged tree, then `script` runs in it.
    fn stage(&mut self, name: &str, script: &str, prepare: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let upper = self.work.join(name);
        let merged = self.mount_merged(Some(&upper))?;
        prepare(&merged)?;
        let own = |name: &str| self.work.join(name);
        let mounts = [
            (own("lists"), "var/lib/apt/lists"),
            (own("archives"), "var/cache/apt/archives"),
            // Names are resolved as on this machine.
            ("/etc/resolv.conf".into(), "etc/resolv.conf"),
            ("/etc/hosts".into(), "etc/hosts"),
        ];
        for (source, target) in mounts {
            let target = merged.join(target);
            if source.is_dir() {
                fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
            }
            process::output(Command::new("mount").arg("--bind").arg(source).arg(&target))?;
        }
        let mut command = Command::new("/usr/sbin/chroot");
        command
            .arg(&merged)
            .args(["sh", "-euc", &format!("{APT_FUNCTION}{script}{CLEAN_SCRIPT}")]);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .env("TZ", "UTC");
        // Not SOURCE_DATE_EPOCH: with it Python compiles bytecode that reads its source at each import, which no ordinary
        // image has. Bytecode by time stamps is reproducible here, for packages fix their files' times.
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("EPOCH", EPOCH.to_string())
            .env("PYTHONHASHSEED", "0");
        command
            .env("APT_CONFIG", format!("{APT_DIRECTORY}/apt.conf"))
            .envs(package_source::proxy_variables()?);
        let done = self.step(name, command);
        crate::sweep::unmount_below(&merged)?;
        done?;
        self.layers.push(upper);
        Ok(())
    }

    /// The layers so far merged, `upper` on top if there is one.
    fn mount_merged(&self, upper: Option<&Path>) -> Result<PathBuf> {
        let merged = self.work.join("merged");
        fs::create_dir_all(&merged).context("cannot create a mount point")?;
        let lower: Vec<_> = self
            .layers
            .iter()
            .rev()
            .map(|layer| layer.display().to_string())
            .collect();
        let mut options = format!("lowerdir={},redirect_dir=off,metacopy=off,index=off", lower.join(":"));
        if let Some(upper) = upper {
            let work = self.work.join("overlay-work");
            fs::create_dir_all(upper)
                .and_then(|()| fs::create_dir_all(&work))
                .context("cannot create a layer")?;
            options += &format!(",upperdir={},workdir={}", upper.display(), work.display());
        }
        process::output(
            Command::new("mount")
                .args(["-t", "overlay", "-o", &options, "overlay"])
                .arg(&merged),
        )?;
        Ok(merged)
    }

    /// Attributes that no program of the base system can set.
    fn mark_attributes(&self) -> Result<()> {
        let upper = self.layers.last().context("no layers")?;
        let set = |path: &str, name: &str, value: &[u8]| {
            let path = upper.join(path);
            rustix::fs::lsetxattr(&path, name, value, rustix::fs::XattrFlags::empty())
                .with_context(|| format!("cannot set {name} on {}", path.display()))
        };
        set("usr/local/bin/capability-example", "security.capability", &CAPABILITY)?;
        set(PROGRAM, "user.origin", b"hullspeed demo")?;
        set("srv/function", "user.empty", b"")
    }

    fn copy_of_merged(&self) -> Result<PathBuf> {
        let merged = self.mount_merged(None)?;
        let copy = self.work.join("copy");
        let mut command = Command::new("cp");
        command.arg("-a").arg(&merged).arg(&copy);
        let done = self.step("copy", command);
        crate::sweep::unmount_below(&merged)?;
        done.map(|()| copy)
    }

    fn step(&self, name: &str, command: Command) -> Result<()> {
        let mut process = self.run.spawn(&format!("image-{name}"), command)?;
        let status = process.wait(STAGE_LIMIT)?;
        if !status.success() {
            bail!(
                "the step {name} failed ({status}); its log ends:\n{}",
                process.log_tail()
            );
        }
        Ok(())
    }
}

fn write_function(merged: &Path) -> Result<()> {
    let directory = merged.join("srv/function");
    fs::create_dir_all(&directory).context("cannot create /srv/function")?;
    for (name, text) in [("server.py", SERVER), ("config.yaml", CONFIG), ("page.html", PAGE)] {
        fs::write(directory.join(name), text).with_context(|| format!("cannot write {name}"))?;
    }
    Ok(())
}

fn image_config() -> ImageConfig {
    ImageConfig {
        entrypoint: vec!["/usr/bin/python3".into(), format!("/{PROGRAM}")],
        env: vec!["PATH=/usr/local/bin:/usr/bin:/bin".into(), "LANG=C.UTF-8".into()],
        working_dir: "/srv/function".into(),
    }
}
