//! The configuration as a file.

use hullspeed_daemon::config::written::{self, list, path, text, time};

use super::{
    AdoptionConfig, CniConfig, CniVerdict, Config, ContainerdConfig, EventsConfig, PoolConfig, RelayConfig, RunAs,
    Supply, WarmConfig,
};

impl Config {
    /// The configuration as a file that would give the same one.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let Self {
            root,
            state,
            socket,
            control_socket,
            stop_timeout,
            log,
            metrics,
            containerd,
            relay,
            pool,
            cni,
            adoption,
            events,
            warm,
        } = self;
        let ContainerdConfig { address } = containerd;
        let mut lines = vec![
            format!("root = {}", path(root)),
            format!("state = {}", path(state)),
            format!("socket = {}", path(socket)),
            format!("control_socket = {}", path(control_socket)),
            format!("stop_timeout = {}", time(*stop_timeout)),
            written::log(log),
            written::metrics(metrics),
            "\n[containerd]".to_owned(),
            format!("address = {}", path(address)),
        ];
        lines.extend(relay_lines(relay));
        lines.extend(pool_lines(pool));
        lines.extend(rule_lines(cni, adoption, events));
        lines.extend(warm_lines(warm));
        lines.join("\n") + "\n"
    }
}

fn relay_lines(relay: &RelayConfig) -> [String; 4] {
    let RelayConfig {
        max_connections,
        max_parallel,
        max_gathered,
    } = relay;
    [
        "\n[relay]".to_owned(),
        format!("max_connections = {max_connections}"),
        format!("max_parallel = {max_parallel}"),
        format!("max_gathered = {}", text(max_gathered)),
    ]
}

fn pool_lines(pool: &PoolConfig) -> [String; 18] {
    let PoolConfig {
        enabled,
        handlers,
        min,
        max,
        max_memory,
        ip_headroom,
        demand_window,
        release_interval,
        refill_quiet,
        refill_deferral,
        refill_interval,
        refill_parallel,
        creation_timeout,
        start_timeout,
        sweep_interval,
        cgroup,
        allow_nri,
    } = pool;
    [
        "\n[pool]".to_owned(),
        format!("enabled = {enabled}"),
        format!("handlers = {}", list(handlers)),
        format!("min = {min}"),
        format!("max = {max}"),
        format!("max_memory = {}", text(max_memory)),
        format!("ip_headroom = {ip_headroom}"),
        format!("demand_window = {}", time(*demand_window)),
        format!("release_interval = {}", time(*release_interval)),
        format!("refill_quiet = {}", time(*refill_quiet)),
        format!("refill_deferral = {}", time(*refill_deferral)),
        format!("refill_interval = {}", time(*refill_interval)),
        format!("refill_parallel = {refill_parallel}"),
        format!("creation_timeout = {}", time(*creation_timeout)),
        format!("start_timeout = {}", time(*start_timeout)),
        format!("sweep_interval = {}", time(*sweep_interval)),
        format!("cgroup = {}", text(cgroup)),
        format!("allow_nri = {allow_nri}"),
    ]
}

fn rule_lines(cni: &CniConfig, adoption: &AdoptionConfig, events: &EventsConfig) -> [String; 10] {
    let CniConfig { allow, verdict } = cni;
    let AdoptionConfig {
        enabled,
        privileged,
        run_as,
        sysctls,
    } = adoption;
    let EventsConfig { supply } = events;
    let verdict = match verdict {
        CniVerdict::Auto => "auto",
        CniVerdict::Allow => "allow",
        CniVerdict::Deny => "deny",
    };
    let run_as = match run_as {
        RunAs::Eligible => "eligible",
        RunAs::Strict => "strict",
    };
    let supply = match supply {
        Supply::Auto => "auto",
        Supply::Off => "off",
    };
    [
        "\n[cni]".to_owned(),
        format!("allow = {}", list(allow)),
        format!("override = {}", text(&verdict)),
        "\n[adoption]".to_owned(),
        format!("enabled = {enabled}"),
        format!("privileged = {privileged}"),
        format!("run_as = {}", text(&run_as)),
        format!("sysctls = {sysctls}"),
        "\n[events]".to_owned(),
        format!("supply = {}", text(&supply)),
    ]
}

fn warm_lines(warm: &WarmConfig) -> [String; 6] {
    let WarmConfig {
        policy,
        snapshotter,
        max_parallel,
        resolve_interval,
        credentials,
    } = warm;
    let policy = policy.as_deref().map_or_else(|| text(&""), path);
    [
        "\n[warm]".to_owned(),
        format!("policy = {policy}"),
        format!("snapshotter = {}", path(snapshotter)),
        format!("max_parallel = {max_parallel}"),
        format!("resolve_interval = {}", time(*resolve_interval)),
        format!("credentials = {credentials}"),
    ]
}
