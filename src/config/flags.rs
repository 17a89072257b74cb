//! The table of all settings: name, default, where the value goes, what it means, and whether the server acts on it.
//! Names of variables follow from the flag's name; names in files are the flag's own unless the row says otherwise.

use super::syntax::{self, Arity, PARSE_ERROR};
use super::{Config, GoDuration, Url};

pub const DEFAULT_NAME: &str = "default";
pub const DEFAULT_PEER_URL: &str = "http://localhost:2380";
pub const DEFAULT_CLIENT_URL: &str = "http://localhost:2379";
pub const DEFAULT_LOG_ROTATION: &str =
    r#"{"maxsize": 100, "maxage": 0, "maxbackups": 0, "localtime": false, "compress": false}"#;

/// How a value is written, and the field it goes to.
#[derive(Clone, Copy)]
pub enum Kind {
    Text(fn(&mut Config) -> &mut String),
    /// One of these words on the command line, where the error may echo a wrong one; a file may say anything, which
    /// is judged later or ignored.
    Choice {
        words: &'static [&'static str],
        echoes: bool,
        slot: fn(&mut Config) -> &mut String,
    },
    Bool(fn(&mut Config) -> &mut bool),
    Uint(fn(&mut Config) -> &mut u64),
    Uint32(fn(&mut Config) -> &mut u32),
    Int(fn(&mut Config) -> &mut i64),
    Duration(fn(&mut Config) -> &mut GoDuration),
    Urls(fn(&mut Config) -> &mut Vec<Url>),
    /// URLs or `*`.
    Origins(fn(&mut Config) -> &mut Vec<String>),
    /// Comma-separated words, in files too.
    Words(fn(&mut Config) -> &mut Vec<String>),
    /// Comma-separated words; a YAML list in files.
    List(fn(&mut Config) -> &mut Vec<String>),
    Gates,
    /// A flag of the past that is still let through.
    Ignored,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The server does what the flag says.
    Acts,
    /// Read and checked, but nothing happens until this part of the server exists.
    Accepted { waiting_for: &'static str },
}

pub struct Flag {
    pub name: &'static str,
    /// Path in a configuration file, dots between levels; empty if files cannot set it.
    pub key: &'static str,
    pub kind: Kind,
    pub default: &'static str,
    pub help: &'static str,
    pub reach: Reach,
}

pub struct Group {
    pub title: &'static str,
    /// What the settings of the group have in common.
    pub about: &'static str,
    pub flags: &'static [Flag],
}

pub fn all() -> impl Iterator<Item = &'static Flag> {
    TABLE.iter().flat_map(|group| group.flags)
}

pub fn find(name: &str) -> Option<&'static Flag> {
    all().find(|flag| flag.name == name)
}

impl Flag {
    /// Name of the variable.
    pub fn env(&self) -> String {
        format!("ETCD_{}", self.name.to_uppercase().replace('-', "_"))
    }

    pub fn arity(&self) -> Arity {
        match self.kind {
            Kind::Bool(_) | Kind::Ignored => Arity::Switch,
            _ => Arity::Value,
        }
    }

    const fn key(mut self, key: &'static str) -> Self {
        self.key = key;
        self
    }

    const fn waits(mut self, waiting_for: &'static str) -> Self {
        self.reach = Reach::Accepted { waiting_for };
        self
    }
}

impl Kind {
    /// Reads a value as written on the command line or in a variable. The error is the reason alone, in Go's words.
    pub fn set(&self, config: &mut Config, text: &str) -> Result<(), String> {
        match self {
            Kind::Text(slot) => *slot(config) = text.to_owned(),
            Kind::Choice { words, echoes, slot } => match words.contains(&text) {
                true => *slot(config) = text.to_owned(),
                false if *echoes => return Err(format!("invalid value {text:?}")),
                false => return Err("invalid value".to_owned()),
            },
            Kind::Bool(slot) => *slot(config) = syntax::parse_bool(text).ok_or(PARSE_ERROR)?,
            Kind::Uint(slot) => *slot(config) = syntax::parse_uint(text, u64::MAX)?,
            Kind::Uint32(slot) => {
                let value = syntax::parse_uint(text, u32::MAX.into()).map_err(|reason| {
                    let reason = if reason == PARSE_ERROR { "invalid syntax" } else { reason };
                    format!("strconv.ParseUint: parsing {text:?}: {reason}")
                })?;
                *slot(config) = u32::try_from(value).expect("the bound was checked");
            }
            Kind::Int(slot) => *slot(config) = syntax::parse_int(text)?,
            Kind::Duration(slot) => *slot(config) = text.parse().map_err(|_| PARSE_ERROR)?,
            // No URLs are no news.
            Kind::Urls(_) if text.is_empty() => {}
            Kind::Urls(slot) => *slot(config) = Url::parse_list(text)?,
            Kind::Origins(slot) => *slot(config) = parse_origins(text)?,
            Kind::Words(slot) | Kind::List(slot) => *slot(config) = parse_words(text),
            Kind::Gates => config.feature_gates.apply(text)?,
            Kind::Ignored => {}
        }
        Ok(())
    }
}

fn parse_origins(text: &str) -> Result<Vec<String>, String> {
    match text {
        "" => Ok(Vec::new()),
        "*" => Ok(vec!["*".to_owned()]),
        _ => Ok(Url::parse_list(text)?.iter().map(Url::to_string).collect()),
    }
}

/// Words in the order given; later repetitions are dropped.
fn parse_words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    if !text.is_empty() {
        for word in text.split(',') {
            if !words.iter().any(|known| known == word) {
                words.push(word.to_owned());
            }
        }
    }
    words
}

const fn flag(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Flag {
    Flag { name, key: name, kind, default, help, reach: Reach::Acts }
}

const fn ignored(name: &'static str) -> Flag {
    flag(name, Kind::Ignored, "", "no effect; accepted so that old start scripts still work").key("")
}

const LIMITS: &str = "5s is kept between members, whatever is given";
const TLS: &str = "TLS";
const AUTH: &str = "users and roles";
const GATEWAY: &str = "the JSON gateway";
const TRACING: &str = "distributed tracing";
const ROTATION: &str = "log rotation";
pub(super) const BBOLT: &str = "nothing: the storage engine has no such setting";

const fn choice(words: &'static [&'static str], slot: fn(&mut Config) -> &mut String) -> Kind {
    Kind::Choice { words, echoes: false, slot }
}

const V2_DEPRECATION: Kind = Kind::Choice {
    words: &["write-only", "write-only-skip-check", "write-only-drop-data", "gone"],
    echoes: true,
    slot: |c| &mut c.v2_deprecation,
};

use Kind::{Bool, Duration, Gates, Int, List, Origins, Text, Uint, Uint32, Urls, Words};

#[rustfmt::skip]
pub static TABLE: &[Group] = &[
    Group {
        title: "Member",
        about: "This process: its name, its files, its listeners, its limits.",
        flags: &[
            flag("name", Text(|c| &mut c.name), DEFAULT_NAME,
                "what this member is called; on the first start it has to be one of the names in --initial-cluster"),
            flag("data-dir", Text(|c| &mut c.data_dir), "",
                "directory of everything the member keeps; empty means <name>.etcd in the working directory"),
            flag("wal-dir", Text(|c| &mut c.wal_dir), "",
                "directory of the write-ahead log, for a disk of its own; empty means inside the data directory"),
            flag("snapshot-count", Uint(|c| &mut c.snapshot_count), "10000",
                "applied entries between two snapshots; each one lets older log files go"),
            flag("snapshot-catchup-entries", Uint(|c| &mut c.snapshot_catchup_entries), "5000",
                "entries kept in memory behind the newest snapshot, so that a slow follower needs no whole snapshot"),
            flag("heartbeat-interval", Uint(|c| &mut c.heartbeat_interval_ms), "100",
                "milliseconds between two heartbeats of the leader; about one round trip between members"),
            flag("election-timeout", Uint(|c| &mut c.election_timeout_ms), "1000",
                "milliseconds without a leader before a member stands for election; at least 5 heartbeats, at most \
                 50000, and the same on every member"),
            flag("initial-election-tick-advance", Bool(|c| &mut c.initial_election_tick_advance), "true",
                "skip most of the wait before the first election after a start"),
            flag("listen-peer-urls", Urls(|c| &mut c.listen_peer_urls), DEFAULT_PEER_URL,
                "where to listen for other members; an address or localhost, no names"),
            flag("listen-client-urls", Urls(|c| &mut c.listen_client_urls), DEFAULT_CLIENT_URL,
                "where to listen for clients; an address or localhost, no names"),
            flag("listen-client-http-urls", Urls(|c| &mut c.listen_client_http_urls), "",
                "listeners for HTTP alone; with any of them --listen-client-urls serves gRPC alone, which keeps \
                 heavy gRPC traffic and HTTP out of each other's way"),
            flag("listen-metrics-urls", Urls(|c| &mut c.listen_metrics_urls), "",
                "further listeners for /metrics and the health pages"),
            flag("max-snapshots", Uint(|c| &mut c.max_snapshots), "5",
                "snapshot files kept, 0 keeps all; deprecated").waits("nothing: snapshots are not kept as files"),
            flag("max-wals", Uint(|c| &mut c.max_wals), "5",
                "log files kept that are no longer needed, 0 keeps all"),
            flag("memory-mlock", Bool(|c| &mut c.memory_mlock), "false",
                "keep the database pages in memory").waits(BBOLT),
            flag("quota-backend-bytes", Int(|c| &mut c.quota_backend_bytes), "0",
                "size of the store at which writes are refused until space is freed; 0 means 2 GiB, less than 0 \
                 means no limit"),
            flag("backend-bbolt-freelist-type", Text(|c| &mut c.backend_bbolt_freelist_type), "",
                "how etcd's storage engine tracks free pages: map or array").waits(BBOLT),
            flag("backend-batch-interval", Duration(|c| &mut c.backend_batch_interval), "0s",
                "longest wait of etcd's storage engine before a commit; 0 means 100ms").waits(BBOLT),
            flag("backend-batch-limit", Int(|c| &mut c.backend_batch_limit), "0",
                "most operations of etcd's storage engine before a commit; 0 means 10000").waits(BBOLT),
            flag("max-txn-ops", Uint(|c| &mut c.max_txn_ops), "128",
                "most comparisons, and most operations in one branch, of a transaction"),
            flag("max-request-bytes", Uint(|c| &mut c.max_request_bytes), "1572864",
                "largest request; large ones delay every other write, more than 10 MiB brings a warning"),
            flag("max-concurrent-streams", Uint32(|c| &mut c.max_concurrent_streams), "4294967295",
                "requests and watches one connection may have open at a time"),
            flag("grpc-keepalive-min-time", Duration(|c| &mut c.grpc_keepalive_min_time), "5s",
                "shortest time between two pings of a client; who goes on with faster ones is disconnected; 0 means 5m"),
            flag("grpc-keepalive-interval", Duration(|c| &mut c.grpc_keepalive_interval), "2h0m0s",
                "how long a connection is quiet before the server pings it; 0 never pings"),
            flag("grpc-keepalive-timeout", Duration(|c| &mut c.grpc_keepalive_timeout), "20s",
                "how long the server waits for the answer to its ping before it disconnects; 0 never pings"),
            flag("socket-reuse-port", Bool(|c| &mut c.socket_reuse_port), "false",
                "let several processes listen on the same port").key("socket-options.reuse-port"),
            flag("socket-reuse-address", Bool(|c| &mut c.socket_reuse_address), "false",
                "listen on an address that still has connections in TIME_WAIT").key("socket-options.reuse-address"),
            flag("enable-grpc-gateway", Bool(|c| &mut c.enable_grpc_gateway), "true",
                "serve the API as JSON over HTTP below /v3/").waits(GATEWAY),
            flag("raft-read-timeout", Duration(|c| &mut c.raft_read_timeout), "5s",
                "how long a connection between members may be silent; at least 5s").key("").waits(LIMITS),
            flag("raft-write-timeout", Duration(|c| &mut c.raft_write_timeout), "5s",
                "how long a write to another member may take; at least 5s").key("").waits(LIMITS),
            flag("feature-gates", Gates, "",
                "switches for single features, as Name=true,Other=false; the names are listed at the end"),
        ],
    },
    Group {
        title: "Clustering",
        about: "How members find each other on the first start. Once data exists, what it says counts and the \
                --initial-* flags are ignored.",
        flags: &[
            flag("initial-advertise-peer-urls", Urls(|c| &mut c.initial_advertise_peer_urls), DEFAULT_PEER_URL,
                "where other members reach this one; must agree with its entry in --initial-cluster"),
            flag("initial-cluster", Text(|c| &mut c.initial_cluster), "default=http://localhost:2380",
                "all first members as name=url pairs, the same list on each; without it, this member alone"),
            flag("initial-cluster-state", choice(&["new", "existing"], |c| &mut c.initial_cluster_state), "new",
                "new forms a cluster, existing joins one that has already been told of this member"),
            flag("initial-cluster-token", Text(|c| &mut c.initial_cluster_token), "etcd-cluster",
                "keeps the IDs of clusters apart that are started from the same list"),
            flag("advertise-client-urls", Urls(|c| &mut c.advertise_client_urls), DEFAULT_CLIENT_URL,
                "where clients reach this member, as told to those who ask; required with --listen-client-urls"),
            flag("discovery-endpoints", List(|c| &mut c.discovery.endpoints), "",
                "another cluster in which the first members find each other; needs --discovery-token")
                .key("discovery-config.client.endpoints"),
            flag("discovery-token", Text(|c| &mut c.discovery.token), "",
                "name of the new cluster in the discovery service").key("discovery-config.token"),
            flag("discovery-dial-timeout", Duration(|c| &mut c.discovery.dial_timeout), "2s",
                "longest wait for a connection to the discovery service")
                .key("discovery-config.client.dial-timeout"),
            flag("discovery-request-timeout", Duration(|c| &mut c.discovery.request_timeout), "5s",
                "longest wait for an answer of the discovery service")
                .key("discovery-config.client.request-timeout"),
            flag("discovery-keepalive-time", Duration(|c| &mut c.discovery.keepalive_time), "2s",
                "time between pings to the discovery service")
                .key("discovery-config.client.keepalive-time"),
            flag("discovery-keepalive-timeout", Duration(|c| &mut c.discovery.keepalive_timeout), "6s",
                "longest wait for the answer to such a ping")
                .key("discovery-config.client.keepalive-timeout"),
            flag("discovery-insecure-transport", Bool(|c| &mut c.discovery.insecure_transport), "true",
                "talk to the discovery service without TLS")
                .key("discovery-config.client.secure.insecure-transport"),
            flag("discovery-insecure-skip-tls-verify", Bool(|c| &mut c.discovery.insecure_skip_tls_verify), "false",
                "do not check the certificate of the discovery service; for tests alone")
                .key("discovery-config.client.secure.insecure-skip-tls-verify").waits(TLS),
            flag("discovery-cert", Text(|c| &mut c.discovery.cert), "",
                "certificate shown to the discovery service")
                .key("discovery-config.client.secure.cert").waits(TLS),
            flag("discovery-key", Text(|c| &mut c.discovery.key), "",
                "key of --discovery-cert").key("discovery-config.client.secure.key").waits(TLS),
            flag("discovery-cacert", Text(|c| &mut c.discovery.cacert), "",
                "authorities trusted to sign the certificate of the discovery service")
                .key("discovery-config.client.secure.cacert").waits(TLS),
            flag("discovery-user", Text(|c| &mut c.discovery.user), "",
                "user at the discovery service, as name or name:password")
                .key("discovery-config.client.auth.username"),
            flag("discovery-password", Text(|c| &mut c.discovery.password), "",
                "password of --discovery-user; then that is the name alone")
                .key("discovery-config.client.auth.password"),
            flag("discovery-srv", Text(|c| &mut c.discovery_srv), "",
                "domain whose DNS SRV records list the first members"),
            flag("discovery-srv-name", Text(|c| &mut c.discovery_srv_name), "",
                "put after the service name of those records, behind a hyphen"),
            flag("discovery-fallback", choice(&["exit", "proxy"], |c| &mut c.discovery_fallback), "exit",
                "leftover of an older discovery; only exit is possible").key(""),
            flag("strict-reconfig-check", Bool(|c| &mut c.strict_reconfig_check), "true",
                "refuse a change of members that would leave too few of them running"),
            flag("pre-vote", Bool(|c| &mut c.pre_vote), "true",
                "ask whether an election could be won before starting it, so that a member that was cut off does not \
                 disturb the others when it returns"),
            flag("auto-compaction-retention", Text(|c| &mut c.auto_compaction_retention), "0",
                "history to keep before it is compacted: a duration like 10m, or hours as a plain number, or with \
                 mode revision a count of revisions; 0 keeps everything"),
            flag("auto-compaction-mode", Text(|c| &mut c.auto_compaction_mode), "periodic",
                "what the retention counts: periodic or revision"),
            flag("v2-deprecation", V2_DEPRECATION, "write-only",
                "checked, otherwise ignored; deprecated"),
        ],
    },
    Group {
        title: "Security",
        about: "Certificates towards clients and towards other members, and who may ask over plain HTTP.",
        flags: &[
            flag("cert-file", Text(|c| &mut c.client_tls.cert_file), "",
                "certificate shown to clients").key("client-transport-security.cert-file").waits(TLS),
            flag("key-file", Text(|c| &mut c.client_tls.key_file), "",
                "key of --cert-file").key("client-transport-security.key-file").waits(TLS),
            flag("client-cert-file", Text(|c| &mut c.client_tls.client_cert_file), "",
                "certificate shown where this process is itself a client; else --cert-file")
                .key("client-transport-security.client-cert-file").waits(TLS),
            flag("client-key-file", Text(|c| &mut c.client_tls.client_key_file), "",
                "key of --client-cert-file").key("client-transport-security.client-key-file").waits(TLS),
            flag("client-cert-auth", Bool(|c| &mut c.client_tls.client_cert_auth), "false",
                "demand certificates of clients; their common name counts as user where no token is sent")
                .key("client-transport-security.client-cert-auth").waits(TLS),
            flag("client-crl-file", Text(|c| &mut c.client_tls.crl_file), "",
                "list of revoked client certificates, DER").key("").waits(TLS),
            flag("client-cert-allowed-hostname", List(|c| &mut c.client_tls.allowed_hostname), "",
                "accept only client certificates made for one of these host names")
                .key("client-transport-security.allowed-hostname").waits(TLS),
            flag("trusted-ca-file", Text(|c| &mut c.client_tls.trusted_ca_file), "",
                "authorities that sign client certificates; setting it demands such certificates")
                .key("client-transport-security.trusted-ca-file").waits(TLS),
            flag("auto-tls", Bool(|c| &mut c.client_tls.auto_tls), "false",
                "make a self-signed certificate for clients if none is given")
                .key("client-transport-security.auto-tls").waits(TLS),
            flag("peer-cert-file", Text(|c| &mut c.peer_tls.cert_file), "",
                "certificate shown to other members").key("peer-transport-security.cert-file").waits(TLS),
            flag("peer-key-file", Text(|c| &mut c.peer_tls.key_file), "",
                "key of --peer-cert-file").key("peer-transport-security.key-file").waits(TLS),
            flag("peer-client-cert-file", Text(|c| &mut c.peer_tls.client_cert_file), "",
                "certificate shown when dialling other members; else --peer-cert-file")
                .key("peer-transport-security.client-cert-file").waits(TLS),
            flag("peer-client-key-file", Text(|c| &mut c.peer_tls.client_key_file), "",
                "key of --peer-client-cert-file").key("peer-transport-security.client-key-file").waits(TLS),
            flag("peer-client-cert-auth", Bool(|c| &mut c.peer_tls.client_cert_auth), "false",
                "demand certificates of other members").key("peer-transport-security.client-cert-auth").waits(TLS),
            flag("peer-trusted-ca-file", Text(|c| &mut c.peer_tls.trusted_ca_file), "",
                "authorities that sign the certificates of members")
                .key("peer-transport-security.trusted-ca-file").waits(TLS),
            flag("peer-cert-allowed-cn", List(|c| &mut c.peer_tls.allowed_cn), "",
                "accept only members with one of these common names; not with --peer-cert-allowed-hostname")
                .key("peer-transport-security.allowed-cn").waits(TLS),
            flag("peer-cert-allowed-hostname", List(|c| &mut c.peer_tls.allowed_hostname), "",
                "accept only members whose certificate was made for one of these host names")
                .key("peer-transport-security.allowed-hostname").waits(TLS),
            flag("peer-auto-tls", Bool(|c| &mut c.peer_tls.auto_tls), "false",
                "make a self-signed certificate for other members if none is given")
                .key("peer-transport-security.auto-tls").waits(TLS),
            flag("peer-crl-file", Text(|c| &mut c.peer_tls.crl_file), "",
                "list of revoked certificates of members, DER").key("").waits(TLS),
            flag("peer-skip-client-san-verification", Bool(|c| &mut c.peer_tls.skip_client_san_verification), "false",
                "do not compare the names in a member's certificate with the address it dials from")
                .key("peer-transport-security.skip-client-san-verification").waits(TLS),
            flag("self-signed-cert-validity", Uint(|c| &mut c.self_signed_cert_validity_years), "1",
                "years for which certificates made here are valid").waits(TLS),
            flag("cipher-suites", List(|c| &mut c.cipher_suites), "",
                "allowed cipher suites of TLS 1.2, by their IANA names").waits(TLS),
            flag("tls-min-version", Text(|c| &mut c.tls_min_version), "TLS1.2",
                "lowest version spoken: TLS1.2 or TLS1.3").waits(TLS),
            flag("tls-max-version", Text(|c| &mut c.tls_max_version), "",
                "highest version spoken: TLS1.2 or TLS1.3; empty means the highest known").waits(TLS),
            flag("cors", Origins(|c| &mut c.cors), "*",
                "web origins whose pages may call the HTTP API; * allows all"),
            flag("host-whitelist", Words(|c| &mut c.host_whitelist), "*",
                "Host names accepted on HTTP requests without TLS; * allows all"),
        ],
    },
    Group {
        title: "Users",
        about: "Passwords and tokens, once authentication is switched on.",
        flags: &[
            flag("auth-token", Text(|c| &mut c.auth_token), "simple",
                "kind of token given at login: simple, or jwt,pub-key=…,priv-key=…,sign-method=…,ttl=…; empty gives \
                 none").waits(AUTH),
            flag("bcrypt-cost", Uint(|c| &mut c.bcrypt_cost), "10",
                "work put into hashing a password, 4 to 31; each step doubles it").waits(AUTH),
            flag("auth-token-ttl", Uint(|c| &mut c.auth_token_ttl_secs), "300",
                "seconds a simple token lives after its last use").waits(AUTH),
        ],
    },
    Group {
        title: "Profiling and monitoring",
        about: "What the server tells about itself.",
        flags: &[
            flag("enable-pprof", Bool(|c| &mut c.enable_pprof), "false",
                "serve /debug/pprof/; of its profiles there is the command line alone").waits("profiles"),
            flag("metrics", Text(|c| &mut c.metrics), "basic",
                "basic, or extensive for latency histograms of each method too"),
            flag("warning-apply-duration", Duration(|c| &mut c.warning_apply_duration), "100ms",
                "applying one request longer than this is logged as a warning"),
            flag("warning-unary-request-duration", Duration(|c| &mut c.warning_unary_request_duration), "300ms",
                "answering one request later than this is logged as a warning; 0 means 300ms"),
        ],
    },
    Group {
        title: "Logging",
        about: "One line an event, to people or machines.",
        flags: &[
            flag("logger", Text(|c| &mut c.logger), "zap",
                "the only choice is zap, which stands for the form of the lines"),
            flag("log-outputs", List(|c| &mut c.log_outputs), "default",
                "where lines go: default (which is stderr), stderr, stdout, systemd/journal or files"),
            flag("log-level", Text(|c| &mut c.log_level), "info",
                "lowest level written: debug, info, warn, error, panic or fatal"),
            flag("log-format", Text(|c| &mut c.log_format), "json",
                "json, or console for reading"),
            flag("enable-log-rotation", Bool(|c| &mut c.enable_log_rotation), "false",
                "start a new file when one is full; needs exactly one file in --log-outputs").waits(ROTATION),
            flag("log-rotation-config-json", Text(|c| &mut c.log_rotation_config_json), DEFAULT_LOG_ROTATION,
                "when a file is full and how many are kept: maxsize in MB, maxage in days, maxbackups")
                .waits(ROTATION),
        ],
    },
    Group {
        title: "Distributed tracing",
        about: "Traces of requests, sent to an OpenTelemetry collector.",
        flags: &[
            flag("enable-distributed-tracing", Bool(|c| &mut c.tracing.enabled), "false",
                "send traces").waits(TRACING),
            flag("distributed-tracing-address", Text(|c| &mut c.tracing.address), "localhost:4317",
                "host:port of the collector").waits(TRACING),
            flag("distributed-tracing-service-name", Text(|c| &mut c.tracing.service_name), "etcd",
                "name of the service in traces; the same on all members of a cluster").waits(TRACING),
            flag("distributed-tracing-instance-id", Text(|c| &mut c.tracing.instance_id), "",
                "name of this member in traces").waits(TRACING),
            flag("distributed-tracing-sampling-rate", Int(|c| &mut c.tracing.sampling_rate), "0",
                "how many of a million requests are traced, 0 to 1000000").waits(TRACING),
        ],
    },
    Group {
        title: "Features",
        about: "Checks, pacing and limits of single features.",
        flags: &[
            flag("corrupt-check-time", Duration(|c| &mut c.corrupt_check_time), "0s",
                "how often members compare their data; 0 never"),
            flag("compact-hash-check-time", Duration(|c| &mut c.compact_hash_check_time), "1m0s",
                "how often the leader compares hashes of compactions, with gate CompactHashCheck"),
            flag("compaction-batch-limit", Int(|c| &mut c.compaction_batch_limit), "0",
                "keys looked at and rows removed before a compaction lets everything else go first; 0 means 200"),
            flag("compaction-sleep-interval", Duration(|c| &mut c.compaction_sleep_interval), "0s",
                "how long it pauses there, whether or not there is anything else; 0 does not"),
            flag("watch-progress-notify-interval", Duration(|c| &mut c.watch_progress_notify_interval), "0s",
                "how often a quiet watch that asked for it hears how far it is; 0 means 10m"),
            flag("downgrade-check-time", Duration(|c| &mut c.downgrade_check_time), "5s",
                "how often the leader looks whether a downgrade is done; 0 never"),
            flag("bootstrap-defrag-threshold-megabytes", Uint(|c| &mut c.bootstrap_defrag_threshold_megabytes), "0",
                "defragment at the start if that frees at least so many megabytes; 0 never").waits(BBOLT),
            flag("max-learners", Int(|c| &mut c.max_learners), "1",
                "members without a vote the cluster may have; the same on every member"),
        ],
    },
    Group {
        title: "Unsafe",
        about: "These give up promises the server otherwise makes. For rescue and for tests.",
        flags: &[
            flag("force-new-cluster", Bool(|c| &mut c.force_new_cluster), "false",
                "make this member's data a cluster of its own, without all other members"),
            flag("unsafe-no-fsync", Bool(|c| &mut c.unsafe_no_fsync), "false",
                "do not wait for the disk; a crash of the machine loses acknowledged writes"),
        ],
    },
    Group {
        title: "Other",
        about: "",
        flags: &[
            flag("config-file", Text(|c| &mut c.config_file), "",
                "take all settings from this YAML or JSON file; other flags and variables are then ignored").key(""),
            flag("version", Bool(|c| &mut c.print_version), "false",
                "print the version and exit").key(""),
            ignored("cluster-active-size"),
            ignored("cluster-remove-delay"),
            ignored("cluster-sync-interval"),
            ignored("config"),
            ignored("force"),
            ignored("max-result-buffer"),
            ignored("max-retry-attempts"),
            ignored("peer-heartbeat-interval"),
            ignored("peer-election-timeout"),
            ignored("retry-interval"),
            ignored("snapshot"),
            ignored("v"),
            ignored("vv"),
            ignored("test.coverprofile"),
            ignored("test.outputdir"),
        ],
    },
];
