//! Settings: which exist (`flags`), where they come from (`load`: command line, environment or file), which values are
//! refused (`validate`), and how Go writes them (`syntax`, `duration`, `url`, `gates`).
//!
//! [`load`] is a function of its arguments only; it opens no file and reads no environment itself. Nothing here knows
//! what a setting does to the server.

pub mod duration;
mod file;
pub mod flags;
pub mod gates;
mod help;
mod load;
pub mod syntax;
pub mod url;
mod validate;

pub use duration::GoDuration;
pub use gates::FeatureGates;
pub use load::{Exit, Level, Loaded, Notice, load};
pub use url::{Scheme, Url};
pub use validate::Retention;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// etcd's version whose behaviour this server has.
pub const ETCD_VERSION: &str = "3.7.1";

/// Every setting, named after its flag. Units are in the names where a plain number has one; what zero stands for is
/// answered by methods. Defaults live in the table of flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub name: String,
    /// Never empty once loaded: without the flag it is `<name>.etcd`.
    pub data_dir: String,
    /// Empty: inside the data directory. See [`Config::wal_path`].
    pub wal_dir: String,
    pub snapshot_count: u64,
    pub snapshot_catchup_entries: u64,
    pub heartbeat_interval_ms: u64,
    pub election_timeout_ms: u64,
    pub initial_election_tick_advance: bool,
    pub listen_peer_urls: Vec<Url>,
    pub listen_client_urls: Vec<Url>,
    /// Empty: `listen_client_urls` serve HTTP too.
    pub listen_client_http_urls: Vec<Url>,
    pub listen_metrics_urls: Vec<Url>,
    pub max_snapshots: u64,
    /// 0 keeps all.
    pub max_wals: u64,
    pub memory_mlock: bool,
    pub quota_backend_bytes: i64,
    pub backend_bbolt_freelist_type: String,
    pub backend_batch_interval: GoDuration,
    pub backend_batch_limit: i64,
    pub max_txn_ops: u64,
    pub max_request_bytes: u64,
    pub max_concurrent_streams: u32,
    pub grpc_keepalive_min_time: GoDuration,
    pub grpc_keepalive_interval: GoDuration,
    pub grpc_keepalive_timeout: GoDuration,
    pub socket_reuse_port: bool,
    pub socket_reuse_address: bool,
    pub enable_grpc_gateway: bool,
    pub raft_read_timeout: GoDuration,
    pub raft_write_timeout: GoDuration,
    pub feature_gates: FeatureGates,

    pub initial_advertise_peer_urls: Vec<Url>,
    pub initial_cluster: String,
    pub initial_cluster_state: String,
    pub initial_cluster_token: String,
    pub advertise_client_urls: Vec<Url>,
    pub discovery: Discovery,
    pub discovery_srv: String,
    pub discovery_srv_name: String,
    pub discovery_fallback: String,
    pub strict_reconfig_check: bool,
    pub pre_vote: bool,
    /// As written; [`Config::retention`] reads it.
    pub auto_compaction_retention: String,
    pub auto_compaction_mode: String,
    pub v2_deprecation: String,

    pub client_tls: Tls,
    pub peer_tls: Tls,
    pub self_signed_cert_validity_years: u64,
    pub cipher_suites: Vec<String>,
    pub tls_min_version: String,
    pub tls_max_version: String,
    /// Empty or `*`: all origins.
    pub cors: Vec<String>,
    /// Empty or `*`: all hosts.
    pub host_whitelist: Vec<String>,

    pub auth_token: String,
    pub bcrypt_cost: u64,
    pub auth_token_ttl_secs: u64,

    pub enable_pprof: bool,
    pub metrics: String,
    pub warning_apply_duration: GoDuration,
    pub warning_unary_request_duration: GoDuration,

    pub logger: String,
    pub log_outputs: Vec<String>,
    pub log_level: String,
    pub log_format: String,
    pub enable_log_rotation: bool,
    pub log_rotation_config_json: String,

    pub tracing: Tracing,

    pub corrupt_check_time: GoDuration,
    pub compact_hash_check_time: GoDuration,
    pub compaction_batch_limit: i64,
    pub compaction_sleep_interval: GoDuration,
    pub watch_progress_notify_interval: GoDuration,
    pub downgrade_check_time: GoDuration,
    pub bootstrap_defrag_threshold_megabytes: u64,
    pub max_learners: i64,
    pub force_new_cluster: bool,
    pub unsafe_no_fsync: bool,

    pub config_file: String,
    pub print_version: bool,
}

/// Finding the first members through another cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Discovery {
    pub endpoints: Vec<String>,
    pub token: String,
    pub dial_timeout: GoDuration,
    pub request_timeout: GoDuration,
    pub keepalive_time: GoDuration,
    pub keepalive_timeout: GoDuration,
    pub insecure_transport: bool,
    pub insecure_skip_tls_verify: bool,
    pub cert: String,
    pub key: String,
    pub cacert: String,
    pub user: String,
    pub password: String,
}

/// TLS of one side: towards clients or towards peers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    pub cert_file: String,
    pub key_file: String,
    pub client_cert_file: String,
    pub client_key_file: String,
    pub client_cert_auth: bool,
    pub crl_file: String,
    pub trusted_ca_file: String,
    pub auto_tls: bool,
    pub allowed_cn: Vec<String>,
    pub allowed_hostname: Vec<String>,
    pub skip_client_san_verification: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tracing {
    pub enabled: bool,
    pub address: String,
    pub service_name: String,
    pub instance_id: String,
    /// Samples per million.
    pub sampling_rate: i64,
}

impl Default for Config {
    /// The same values as the texts in the table of flags, which a test compares.
    fn default() -> Self {
        let url = |text| vec![Url::parse(text).expect("the default URLs are well formed")];
        let millis = GoDuration::from_millis;
        let secs = GoDuration::from_secs;
        Config {
            name: flags::DEFAULT_NAME.into(),
            data_dir: String::new(),
            wal_dir: String::new(),
            snapshot_count: 10_000,
            snapshot_catchup_entries: 5_000,
            heartbeat_interval_ms: 100,
            election_timeout_ms: 1_000,
            initial_election_tick_advance: true,
            listen_peer_urls: url(flags::DEFAULT_PEER_URL),
            listen_client_urls: url(flags::DEFAULT_CLIENT_URL),
            listen_client_http_urls: Vec::new(),
            listen_metrics_urls: Vec::new(),
            max_snapshots: 5,
            max_wals: 5,
            memory_mlock: false,
            quota_backend_bytes: 0,
            backend_bbolt_freelist_type: String::new(),
            backend_batch_interval: GoDuration::ZERO,
            backend_batch_limit: 0,
            max_txn_ops: 128,
            max_request_bytes: 1_572_864,
            max_concurrent_streams: u32::MAX,
            grpc_keepalive_min_time: secs(5),
            grpc_keepalive_interval: secs(2 * 3600),
            grpc_keepalive_timeout: secs(20),
            socket_reuse_port: false,
            socket_reuse_address: false,
            enable_grpc_gateway: true,
            raft_read_timeout: secs(5),
            raft_write_timeout: secs(5),
            feature_gates: FeatureGates::default(),
            initial_advertise_peer_urls: url(flags::DEFAULT_PEER_URL),
            initial_cluster: format!("{}={}", flags::DEFAULT_NAME, flags::DEFAULT_PEER_URL),
            initial_cluster_state: "new".into(),
            initial_cluster_token: "etcd-cluster".into(),
            advertise_client_urls: url(flags::DEFAULT_CLIENT_URL),
            discovery: Discovery {
                dial_timeout: secs(2),
                request_timeout: secs(5),
                keepalive_time: secs(2),
                keepalive_timeout: secs(6),
                insecure_transport: true,
                ..Discovery::default()
            },
            discovery_srv: String::new(),
            discovery_srv_name: String::new(),
            discovery_fallback: "exit".into(),
            strict_reconfig_check: true,
            pre_vote: true,
            auto_compaction_retention: "0".into(),
            auto_compaction_mode: "periodic".into(),
            v2_deprecation: "write-only".into(),
            client_tls: Tls::default(),
            peer_tls: Tls::default(),
            self_signed_cert_validity_years: 1,
            cipher_suites: Vec::new(),
            tls_min_version: "TLS1.2".into(),
            tls_max_version: String::new(),
            cors: vec!["*".into()],
            host_whitelist: vec!["*".into()],
            auth_token: "simple".into(),
            bcrypt_cost: 10,
            auth_token_ttl_secs: 300,
            enable_pprof: false,
            metrics: "basic".into(),
            warning_apply_duration: millis(100),
            warning_unary_request_duration: millis(300),
            logger: "zap".into(),
            log_outputs: vec!["default".into()],
            log_level: "info".into(),
            log_format: "json".into(),
            enable_log_rotation: false,
            log_rotation_config_json: flags::DEFAULT_LOG_ROTATION.into(),
            tracing: Tracing { address: "localhost:4317".into(), service_name: "etcd".into(), ..Tracing::default() },
            corrupt_check_time: GoDuration::ZERO,
            compact_hash_check_time: secs(60),
            compaction_batch_limit: 0,
            compaction_sleep_interval: GoDuration::ZERO,
            watch_progress_notify_interval: GoDuration::ZERO,
            downgrade_check_time: secs(5),
            bootstrap_defrag_threshold_megabytes: 0,
            max_learners: 1,
            force_new_cluster: false,
            unsafe_no_fsync: false,
            config_file: String::new(),
            print_version: false,
        }
    }
}

impl Config {
    /// The members of a first start when nobody lists them: this one alone.
    fn initial_cluster_of_one(&self) -> String {
        // An empty name is found in no list.
        let name = if self.name.is_empty() { "default" } else { &self.name };
        let pairs: Vec<_> = self.initial_advertise_peer_urls.iter().map(|url| format!("{name}={url}")).collect();
        pairs.join(",")
    }

    /// Directory of the write-ahead log.
    pub fn wal_path(&self) -> PathBuf {
        match self.wal_dir.is_empty() {
            true => self.member_path().join("wal"),
            false => PathBuf::from(&self.wal_dir),
        }
    }

    pub fn member_path(&self) -> PathBuf {
        PathBuf::from(&self.data_dir).join("member")
    }

    /// Ticks a follower waits for its leader; a tick is one heartbeat interval.
    pub fn election_ticks(&self) -> u64 {
        self.election_timeout_ms / self.heartbeat_interval_ms.max(1)
    }

    /// Largest size of the store; `None` without a quota.
    pub fn quota(&self) -> Option<u64> {
        match self.quota_backend_bytes {
            0 => Some(2 << 30),
            bytes => u64::try_from(bytes).ok(),
        }
    }

    /// How often the server pings idle connections and how long it waits; `None` when either is off.
    pub fn server_pings(&self) -> Option<(Duration, Duration)> {
        let (every, within) = (self.grpc_keepalive_interval, self.grpc_keepalive_timeout);
        (every > GoDuration::ZERO && within > GoDuration::ZERO).then(|| (every.to_std(), within.to_std()))
    }

    /// Between two pings of a client; gRPC's own bound if none is set.
    pub fn least_ping_gap(&self) -> Duration {
        let least = self.grpc_keepalive_min_time;
        if least > GoDuration::ZERO { least.to_std() } else { Duration::from_secs(300) }
    }

    /// Where connections to other members come from, if that is to be known: the first address told to them that is not of
    /// this machine alone.
    pub fn local_address(&self) -> Option<IpAddr> {
        let address = |url: &Url| url.host().trim_matches(['[', ']']).parse::<IpAddr>().ok();
        let mut told = self.initial_advertise_peer_urls.iter().filter_map(address);
        self.feature_gates
            .enabled("SetMemberLocalAddr")
            .then(|| told.find(|a| !a.is_loopback() && !a.is_unspecified()))?
    }

    pub fn slow_unary_request(&self) -> Duration {
        self.warning_unary_request_duration.or_if_unset(Duration::from_millis(300))
    }

    /// Keys that one slice of clean-up after a compaction looks at, and rows it removes. Unless told otherwise about 0.3 ms of work: what
    /// comes meanwhile waits for no more than that.
    pub fn compaction_batch(&self) -> usize {
        usize::try_from(self.compaction_batch_limit).ok().filter(|limit| *limit > 0).unwrap_or(200)
    }

    /// Pause between two such slices. None unless it is asked for: everything else goes first anyway.
    pub fn compaction_pause(&self) -> Duration {
        self.compaction_sleep_interval.or_if_unset(Duration::ZERO)
    }

    /// Period of progress answers on quiet watches, at least 100 ms.
    pub fn watch_progress_interval(&self) -> Duration {
        self.watch_progress_notify_interval.or_if_unset(Duration::from_secs(600)).max(Duration::from_millis(100))
    }

    pub fn bcrypt_cost(&self) -> u32 {
        u32::try_from(self.bcrypt_cost).ok().filter(|cost| (4..=31).contains(cost)).unwrap_or(10)
    }

    /// Whether others would be told `localhost` although this member listens on every interface, so that
    /// [`Config::adopt_default_host`] is worth calling.
    pub fn wants_default_host(&self) -> bool {
        self.advertises_localhost_for_all_interfaces().iter().any(|wanted| *wanted)
    }

    /// Puts `host`, the address of the machine's default route, in place of `localhost` in the advertised URLs that
    /// are still at their default while the listener hears every interface. The default cluster list follows.
    pub fn adopt_default_host(&mut self, host: &str) {
        let [peers, clients] = self.advertises_localhost_for_all_interfaces();
        let follows = self.initial_cluster == self.initial_cluster_of_one();
        let advertised = |listen: &[Url]| vec![listen[0].with_host(host)];
        if peers {
            self.initial_advertise_peer_urls = advertised(&self.listen_peer_urls);
        }
        if clients {
            self.advertise_client_urls = advertised(&self.listen_client_urls);
        }
        if follows {
            self.initial_cluster = self.initial_cluster_of_one();
        }
    }

    fn advertises_localhost_for_all_interfaces(&self) -> [bool; 2] {
        let is_default = |urls: &[Url], text: &str| matches!(urls, [url] if url.as_str() == text);
        let is_wildcard = |urls: &[Url]| urls.first().is_some_and(|url| !url.is_socket() && url.is_wildcard());
        [
            is_wildcard(&self.listen_peer_urls)
                && is_default(&self.initial_advertise_peer_urls, flags::DEFAULT_PEER_URL),
            is_wildcard(&self.listen_client_urls) && is_default(&self.advertise_client_urls, flags::DEFAULT_CLIENT_URL),
        ]
    }
}
