//! Rules between settings. The order of the checks is fixed: of several mistakes, tools expect the first.

use super::load::{Draft, Level, Notice, Source};
use super::{Config, GoDuration, Url, flags, gates, url};

/// Lower values would be noise on a busy network.
const RAFT_TIMEOUT_MIN: GoDuration = GoDuration::from_secs(5);
const ELECTION_TIMEOUT_MAX_MS: u64 = 50_000;
const REQUEST_BYTES_ADVISED_MAX: u64 = 10 << 20;
const QUOTA_BYTES_ADVISED_MAX: i64 = 8 << 30;
const SAMPLES_MAX: i64 = 1_000_000;
const TLS_VERSIONS: [&str; 2] = ["TLS1.2", "TLS1.3"];

/// How much history auto-compaction keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retention {
    /// Everything.
    Off,
    /// As of so long ago.
    Period(GoDuration),
    /// So many revisions.
    Revisions(i64),
}

impl Config {
    pub fn retention(&self) -> Result<Retention, String> {
        let text = &self.auto_compaction_retention;
        let by_revision = self.auto_compaction_mode == "revision";
        let error = |reason: String| format!("error parsing CompactionRetention: {reason}");
        // A plain number counts hours or revisions; anything else is a duration, read as a count of nanoseconds if
        // revisions are meant.
        let amount = match text.parse::<i64>() {
            Ok(count) if count >= 0 && by_revision => GoDuration::from_nanos(count),
            Ok(count) if count >= 0 => {
                GoDuration::from_hours(count).ok_or_else(|| error(format!("{text} hours are more than 292 years")))?
            }
            _ => text.parse().map_err(|reason| error(format!("{reason}")))?,
        };
        Ok(match amount.nanos() {
            0 => Retention::Off,
            count if by_revision => Retention::Revisions(count),
            _ => Retention::Period(amount),
        })
    }
}

/// Fills in what follows from other settings.
pub(super) fn settle(draft: &mut Draft) {
    let from_file = draft.source == Source::File;
    let advertise_is_due = !from_file && draft.is_set("listen-client-urls") && !draft.is_set("advertise-client-urls");
    let config = &mut draft.config;
    if advertise_is_due {
        config.advertise_client_urls = Vec::new();
    }
    if !from_file {
        config.raft_read_timeout = config.raft_read_timeout.max(RAFT_TIMEOUT_MIN);
        config.raft_write_timeout = config.raft_write_timeout.max(RAFT_TIMEOUT_MIN);
    }
    let discovers = !config.discovery_srv.is_empty()
        || !config.discovery.endpoints.is_empty()
        || (!from_file && !config.discovery_srv_name.is_empty());
    let built_in = Config::default().initial_cluster;
    let cluster_at_default =
        config.initial_cluster == built_in && (from_file || !draft.set.contains("initial-cluster"));
    if cluster_at_default && discovers {
        config.initial_cluster = String::new();
    } else if config.initial_cluster == built_in {
        config.initial_cluster = config.initial_cluster_of_one();
    }
}

/// What ends the start with "failed to verify flags".
pub(super) fn check(draft: &Draft) -> Result<(), String> {
    let config = &draft.config;
    if config.discovery_fallback == "proxy" {
        return Err(r#"v2 proxy is deprecated, and --discovery-fallback can't be configured as "proxy""#.into());
    }
    check_logging(config)?;
    check_urls(config)?;
    if !["new", "existing"].contains(&config.initial_cluster_state.as_str()) {
        return Err(format!("unexpected clusterState {:?}", config.initial_cluster_state));
    }
    check_bootstrap(config)?;
    check_raft_times(config)?;
    if draft.is_set("listen-client-urls") && config.advertise_client_urls.is_empty() {
        return Err("--advertise-client-urls is required when --listen-client-urls is set explicitly".into());
    }
    match config.auto_compaction_mode.as_str() {
        "periodic" | "revision" => {}
        "" => return Err("undefined auto-compaction-mode".into()),
        other => return Err(format!("unknown auto-compaction-mode {other:?}")),
    }
    let rate = config.tracing.sampling_rate;
    if config.tracing.enabled && !(0..=SAMPLES_MAX).contains(&rate) {
        return Err(format!("--distributed-tracing-sampling-rate must be between 0 and {SAMPLES_MAX} (set to {rate})"));
    }
    let open = |gate| config.feature_gates.enabled(gate);
    if open(gates::LEASE_CHECKPOINT_PERSIST) && !open(gates::LEASE_CHECKPOINT) {
        return Err(
            "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint".into()
        );
    }
    if config.compact_hash_check_time <= GoDuration::ZERO {
        return Err(format!("--compact-hash-check-time must be >0 (set to {})", config.compact_hash_check_time));
    }
    check_tls_versions(config)
}

fn check_logging(config: &Config) -> Result<(), String> {
    match config.logger.as_str() {
        "zap" => {}
        "capnslog" => return Err("--logger=capnslog is removed in v3.5".into()),
        other => return Err(format!("unknown logger option {other:?}")),
    }
    let outputs = &config.log_outputs;
    if outputs.len() > 1 && outputs.iter().any(|output| output == "default") {
        return Err(r#"multi logoutput for "default" is not supported yet"#.into());
    }
    if outputs.is_empty() || outputs.iter().any(String::is_empty) {
        return Err(r#"open sink "": open : no such file or directory"#.into());
    }
    if config.enable_log_rotation {
        let is_file = |output: &&String| !["default", "stderr", "stdout", "systemd/journal"].contains(&output.as_str());
        if outputs.iter().filter(is_file).count() != 1 || outputs.len() != 1 {
            return Err("--log-outputs requires a single file path when --log-rotate-config-json is defined".into());
        }
        if let Err(error) =
            serde_json::from_str::<serde_json::Map<_, serde_json::Value>>(&config.log_rotation_config_json)
        {
            return Err(format!("improperly formatted log rotation config: {error}"));
        }
    }
    if Level::parse(&config.log_level).is_none() {
        let levels = Level::ALL.map(Level::name).join(", ");
        return Err(format!("unrecognized level: {:?} (--log-level must be one of: {levels})", config.log_level));
    }
    if !["json", "console"].contains(&config.log_format.as_str()) {
        return Err(format!(
            "unknown log format: {:?} (--log-format must be one of: json, console)",
            config.log_format
        ));
    }
    Ok(())
}

fn check_urls(config: &Config) -> Result<(), String> {
    let listeners = [
        &config.listen_peer_urls,
        &config.listen_client_urls,
        &config.listen_client_http_urls,
        &config.listen_metrics_urls,
    ];
    listeners.into_iter().flatten().try_for_each(Url::check_for_binding)?;
    let dialled = |urls: &[Url]| urls.iter().try_for_each(Url::check_for_dialling);
    let peers = &config.initial_advertise_peer_urls;
    dialled(peers).map_err(|reason| {
        format!("--initial-advertise-peer-urls {:?} must be \"host:port\" ({reason})", url::join(peers))
    })?;
    let clients = &config.advertise_client_urls;
    dialled(clients).map_err(|reason| {
        format!(
            "--advertise-client-urls {:?} must be in the format \"host:port\", \"unix:/path/to/socket\" or \
             \"unixs:/path/to/socket\" ({reason})",
            url::join(clients)
        )
    })
}

fn check_bootstrap(config: &Config) -> Result<(), String> {
    let discovery = &config.discovery;
    let (by_endpoints, by_token) = (!discovery.endpoints.is_empty(), !discovery.token.is_empty());
    let ways = [!config.initial_cluster.is_empty(), !config.discovery_srv.is_empty(), by_endpoints];
    if ways.into_iter().filter(|used| *used).count() > 1 {
        return Err("multiple discovery or bootstrap flags are set. Choose one of \"initial-cluster\", \
                    \"discovery-endpoints\" or \"discovery-srv\""
            .into());
    }
    if by_endpoints != by_token {
        return Err("both --discovery-token and --discovery-endpoints must be set".into());
    }
    if discovery.endpoints.iter().any(|endpoint| endpoint.trim().is_empty()) {
        return Err("--discovery-endpoints must not contain empty endpoints".into());
    }
    Ok(())
}

fn check_raft_times(config: &Config) -> Result<(), String> {
    let (heartbeat, election) = (config.heartbeat_interval_ms, config.election_timeout_ms);
    if heartbeat == 0 {
        return Err("--heartbeat-interval must be >0 (set to 0ms)".into());
    }
    if election == 0 {
        return Err("--election-timeout must be >0 (set to 0ms)".into());
    }
    if heartbeat.saturating_mul(5) > election {
        return Err(format!(
            "--election-timeout[{election}ms] should be at least as 5 times as --heartbeat-interval[{heartbeat}ms]"
        ));
    }
    if election > ELECTION_TIMEOUT_MAX_MS {
        return Err(format!("--election-timeout[{election}ms] is too long, and should be set less than 50000ms"));
    }
    Ok(())
}

fn check_tls_versions(config: &Config) -> Result<(), String> {
    let (min, max) = (config.tls_min_version.as_str(), config.tls_max_version.as_str());
    for version in [min, max] {
        if !version.is_empty() && !TLS_VERSIONS.contains(&version) {
            return Err(format!("unexpected TLS version {version:?} (must be one of: {})", TLS_VERSIONS.join(", ")));
        }
    }
    if min == "TLS1.3" && max == "TLS1.2" {
        return Err(format!("min version ({min}) is greater than max version ({max})"));
    }
    if min == "TLS1.3" && !config.cipher_suites.is_empty() {
        return Err("cipher suites cannot be configured when only TLS1.3 is enabled".into());
    }
    Ok(())
}

/// What is well formed but cannot be served.
pub(super) fn check_start(config: &Config) -> Result<(), String> {
    let listeners = [
        ("listen-peer-urls", &config.listen_peer_urls),
        ("listen-client-urls", &config.listen_client_urls),
        ("listen-client-http-urls", &config.listen_client_http_urls),
        ("listen-metrics-urls", &config.listen_metrics_urls),
    ];
    for (name, urls) in listeners {
        // Plaintext in place of TLS would be worse than no service.
        if let Some(url) = urls.iter().find(|url| url.is_secure()) {
            return Err(format!("--{name} {url}: TLS is not implemented yet; use http or unix, or wait for it"));
        }
    }
    if let Some(url) = config.listen_client_urls.iter().find(|url| config.listen_client_http_urls.contains(url)) {
        return Err(format!("{url} is both in --listen-client-urls and in --listen-client-http-urls"));
    }
    if !config.peer_tls.allowed_cn.is_empty() && !config.peer_tls.allowed_hostname.is_empty() {
        return Err("--peer-cert-allowed-cn and --peer-cert-allowed-hostname exclude each other".into());
    }
    let provider = config.auth_token.split(',').next().unwrap_or_default();
    if !["", "simple", "jwt"].contains(&provider) {
        return Err(format!("unknown token provider {provider:?} in --auth-token (must be simple or jwt)"));
    }
    config.retention().map(|_| ())
}

/// Adds what deserves a remark but stops nothing.
pub(super) fn remark(draft: &mut Draft) {
    let mut remarks = Vec::new();
    let mut warn = |message: &str| remarks.push(Notice::warn(message));
    if draft.is_set("max-snapshots") {
        warn("--max-snapshots is deprecated in 3.6 and will be decommissioned in 3.8");
    }
    if draft.is_set("v2-deprecation") {
        warn(
            "--v2-deprecation is deprecated and scheduled for removal in v3.8. The default value is enforced, \
             ignoring user input",
        );
    }
    let config = &mut draft.config;
    config.v2_deprecation = Config::default().v2_deprecation;
    if config.name == flags::DEFAULT_NAME {
        warn("the member has the default name; members of one cluster need names of their own, see --name");
    }
    if config.listen_client_http_urls.is_empty() {
        warn("gRPC and HTTP share their listeners; --listen-client-http-urls gives HTTP its own");
    }
    if config.max_request_bytes > REQUEST_BYTES_ADVISED_MAX {
        warn("--max-request-bytes is above 10 MiB; requests of that size delay all others");
    }
    if config.quota_backend_bytes > QUOTA_BYTES_ADVISED_MAX {
        warn("--quota-backend-bytes is above 8 GiB");
    }
    let open = |gate| config.feature_gates.enabled(gate);
    if open(gates::LEASE_CHECKPOINT) && !open(gates::LEASE_CHECKPOINT_PERSIST) {
        warn("LeaseCheckpoint without LeaseCheckpointPersist: what is left of leases is forgotten by a restart");
    }
    for (tls, urls, name) in [
        (&config.peer_tls, &config.listen_peer_urls, "listen-peer-urls"),
        (&config.client_tls, &config.listen_client_urls, "listen-client-urls"),
    ] {
        let has_certificate = !tls.cert_file.is_empty() || !tls.key_file.is_empty();
        if has_certificate && urls.iter().any(|url| !url.is_secure()) {
            warn(&format!("certificates are given, but --{name} has a URL without TLS"));
        }
    }
    if config.data_dir.is_empty() {
        config.data_dir = format!("{}.etcd", config.name);
        remarks.push(Notice::warn("no --data-dir given, using the default").with("data-dir", &config.data_dir));
    }
    let mut idle: Vec<String> = flags::all()
        .filter(|flag| draft.set.contains(flag.name))
        .filter_map(|flag| match flag.reach {
            flags::Reach::Acts => None,
            flags::Reach::Accepted { waiting_for } => Some(format!("--{} ({waiting_for})", flag.name)),
        })
        .collect();
    idle.extend(config.feature_gates.idle().map(|(gate, why)| format!("--feature-gates={gate} ({why})")));
    if !idle.is_empty() {
        remarks.push(Notice::warn("settings that do not act yet").with("flags", idle.join(", ")));
    }
    draft.notices.append(&mut remarks);
}
