//! How settings are read and refused: precedence, Go's syntax, exit codes, the order and texts of validation.

use actd::config::{Config, Exit, Level, Loaded, Notice, load};
use std::io;

type Pairs<'a> = &'a [(&'a str, &'a str)];

fn try_load(args: &[&str], env: Pairs, file: Option<&str>) -> Result<Loaded, Exit> {
    let env = env.iter().map(|(key, value)| (key.to_string(), value.to_string()));
    load(args.iter().map(|arg| arg.to_string()), env, |_| {
        file.map(str::to_owned).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    })
}

fn run(args: &[&str], env: Pairs, file: Option<&str>) -> (Config, Vec<Notice>) {
    match try_load(args, env, file) {
        Ok(Loaded::Run(config, notices)) => (*config, notices),
        other => panic!("{args:?} {env:?} {file:?}: {other:?}"),
    }
}

fn exit(args: &[&str], env: Pairs, file: Option<&str>) -> Exit {
    match try_load(args, env, file) {
        Err(exit) => exit,
        Ok(loaded) => panic!("{args:?} {env:?} {file:?} is accepted: {loaded:?}"),
    }
}

/// The error of a start refused with 1 and a log line.
fn refusal(args: &[&str], env: Pairs, file: Option<&str>) -> String {
    let exit = exit(args, env, file);
    assert_eq!((exit.code, exit.stderr.as_str()), (1, ""), "{args:?}");
    let last = exit.notices.last().expect("a log line says why");
    assert_eq!((last.level, last.message.as_str()), (Level::Warn, "failed to verify flags"), "{args:?}");
    assert_eq!(last.fields[0].0, "error");
    last.fields[0].1.clone()
}

#[test]
fn empty_urls_leave_what_was_said_before() {
    let of = |args: &[&str]| run(args, &[], None).0;
    let [client, other] = ["http://127.0.0.1:1", "http://127.0.0.1:2"];
    let shown = |urls: &[actd::config::Url]| urls.iter().map(ToString::to_string).collect::<Vec<_>>();
    let listen = format!("--listen-client-urls={client}");
    let config = of(&[
        &listen,
        "--listen-client-urls=",
        &format!("--advertise-client-urls={other}"),
        "--advertise-client-urls=",
    ]);
    assert_eq!(shown(&config.listen_client_urls), [client]);
    assert_eq!(shown(&config.advertise_client_urls), [other]);
    // The flag counts as given.
    let config = of(&[&listen, "--advertise-client-urls="]);
    assert_eq!(shown(&config.advertise_client_urls), ["http://localhost:2379"]);
}

#[test]
fn empty_name_is_none_of_the_first_members() {
    let (config, _) = run(&["--name="], &[], None);
    assert_eq!((config.name.as_str(), config.initial_cluster.as_str()), ("", "default=http://localhost:2380"));
}

fn in_file(text: &str) -> Result<Loaded, Exit> {
    try_load(&["--config-file=x"], &[], Some(text))
}

#[test]
fn bad_flags_end_with_2_a_message_and_the_usage() {
    let cases = [
        ("--foo", "flag provided but not defined: -foo"),
        ("--discovery=x", "flag provided but not defined: -discovery"),
        ("--discovery-proxy=x", "flag provided but not defined: -discovery-proxy"),
        (
            "--experimental-compaction-batch-limit=1",
            "flag provided but not defined: -experimental-compaction-batch-limit",
        ),
        ("--name", "flag needs an argument: -name"),
        ("---name=x", "bad flag syntax: ---name=x"),
        ("--snapshot-count=abc", r#"invalid value "abc" for flag -snapshot-count: parse error"#),
        ("--snapshot-count=-1", r#"invalid value "-1" for flag -snapshot-count: parse error"#),
        ("--max-txn-ops=", r#"invalid value "" for flag -max-txn-ops: parse error"#),
        (
            "--snapshot-count=99999999999999999999999",
            r#"invalid value "99999999999999999999999" for flag -snapshot-count: value out of range"#,
        ),
        (
            "--max-concurrent-streams=4294967296",
            r#"invalid value "4294967296" for flag -max-concurrent-streams: strconv.ParseUint: parsing "4294967296": value out of range"#,
        ),
        ("--quota-backend-bytes=0x", r#"invalid value "0x" for flag -quota-backend-bytes: parse error"#),
        ("--grpc-keepalive-interval=5", r#"invalid value "5" for flag -grpc-keepalive-interval: parse error"#),
        ("--pre-vote=yes", r#"invalid boolean value "yes" for -pre-vote: parse error"#),
        ("--version=x", r#"invalid boolean value "x" for -version: parse error"#),
        (
            "--listen-client-urls=foo",
            r#"invalid value "foo" for flag -listen-client-urls: URL scheme must be http, https, unix, or unixs: foo"#,
        ),
        ("--cors=foo", r#"invalid value "foo" for flag -cors: URL scheme must be http, https, unix, or unixs: foo"#),
        ("--initial-cluster-state=foo", r#"invalid value "foo" for flag -initial-cluster-state: invalid value"#),
        ("--discovery-fallback=x", r#"invalid value "x" for flag -discovery-fallback: invalid value"#),
        ("--v2-deprecation=not-yet", r#"invalid value "not-yet" for flag -v2-deprecation: invalid value "not-yet""#),
        ("--feature-gates=A", r#"invalid value "A" for flag -feature-gates: missing bool value for A"#),
        ("--feature-gates=A=true", r#"invalid value "A=true" for flag -feature-gates: unrecognized feature gate: A"#),
    ];
    for (arg, message) in cases {
        let exit = exit(&[arg], &[], None);
        assert_eq!(exit.code, 2, "{arg}");
        let (first, rest) = exit.stderr.split_once('\n').expect("two lines");
        assert_eq!(first, message);
        assert!(rest.starts_with("Usage:\n"), "{arg}");
    }
    // The first mistake from the left is told, also when a file is named.
    assert!(
        exit(&["--config-file=x", "--foo", "--bar"], &[], Some(""))
            .stderr
            .starts_with("flag provided but not defined: -foo\n")
    );
}

#[test]
fn stray_words_end_with_1() {
    for args in [&["--pre-vote", "yes"][..], &["yes"], &["--", "yes", "--foo"], &["--v", "yes"], &["--version", "yes"]]
    {
        assert_eq!(refusal(args, &[], None), r#""yes" is not a valid flag"#);
    }
    assert_eq!(refusal(&["-"], &[], None), r#""-" is not a valid flag"#);
}

#[test]
fn version_is_four_lines_and_help_two_texts() {
    let Ok(Loaded::Print { stdout, stderr, code }) = try_load(&["--version"], &[("ETCD_NAME", "")], None) else {
        panic!("--version prints")
    };
    assert_eq!((code, stderr.as_str(), stdout.lines().count()), (0, "", 4));
    let starts: Vec<_> = stdout.lines().map(|line| line.split(':').next().unwrap_or_default()).collect();
    assert_eq!(starts, ["etcd Version", "Git SHA", "Go Version", "Go OS/Arch"]);
    assert!(stdout.starts_with("etcd Version: 3.7.1\n"));

    for arg in ["-h", "--help", "-help"] {
        let Ok(Loaded::Print { stdout, stderr, code }) = try_load(&["--name=x", arg], &[], None) else {
            panic!("{arg} prints")
        };
        assert_eq!(code, 0);
        assert!(stderr.starts_with("Usage:\n"));
        for flag in actd::config::flags::all().filter(|flag| !flag.help.starts_with("no effect")) {
            assert!(stdout.contains(&format!("\n  --{}=", flag.name)), "{}", flag.name);
        }
        let prose = stdout.lines().filter(|line| !line.starts_with("  --"));
        assert_eq!(prose.filter(|line| line.chars().count() > 110).collect::<Vec<_>>(), [""; 0], "too long to read");
    }
}

#[test]
fn flags_win_over_variables_only_by_excluding_them() {
    let (config, _) = run(&["--name=a", "--name=b", "-max-txn-ops", "0x10"], &[("ETCD_MAX_WALS", "7")], None);
    assert_eq!((config.name.as_str(), config.max_txn_ops, config.max_wals), ("b", 16, 7));
    for value in ["", "b"] {
        let exit = exit(&["--name=b"], &[("ETCD_PRE_VOTE", "bad"), ("ETCD_FOO", "1"), ("ETCD_NAME", value)], None);
        assert_eq!(exit.code, 1);
        let last = exit.notices.last().expect("a line");
        assert_eq!(last.level, Level::Fatal);
        assert_eq!(
            last.message,
            "conflicting environment variable is shadowed by corresponding command-line flag \
             (either unset environment variable or disable flag))"
        );
        assert_eq!(last.fields, [("environment-variable", "ETCD_NAME".to_owned())]);
    }
}

#[test]
fn variables_that_mean_nothing_bring_a_warning() {
    let env = [("ETCD_FOO", "1"), ("ETCD_NAME", ""), ("ETCD_VERSION", "1"), ("PATH", "x"), ("ETCD_VERIFY", "all")];
    let (config, notices) = run(&[], &env, None);
    assert_eq!(config.name, "default");
    let unknown: Vec<_> = notices
        .iter()
        .filter(|notice| notice.message == "unrecognized environment variable")
        .map(|notice| notice.fields[0].1.as_str())
        .collect();
    assert_eq!(unknown, ["ETCD_FOO=1", "ETCD_NAME=", "ETCD_VERIFY=all"]);
    assert!(notices.iter().any(|notice| notice.message == "cannot set special environment variable"));
    assert!(notices.iter().all(|notice| notice.level <= Level::Warn));
}

#[test]
fn bad_variables_end_with_1() {
    let cases = [
        ("ETCD_SNAPSHOT_COUNT", "abc", r#"invalid value "abc" for ETCD_SNAPSHOT_COUNT: parse error"#),
        ("ETCD_PRE_VOTE", "maybe", r#"invalid value "maybe" for ETCD_PRE_VOTE: parse error"#),
        ("ETCD_INITIAL_CLUSTER_STATE", "foo", r#"invalid value "foo" for ETCD_INITIAL_CLUSTER_STATE: invalid value"#),
        ("ETCD_CORS", "y", r#"invalid value "y" for ETCD_CORS: URL scheme must be http, https, unix, or unixs: y"#),
        (
            "ETCD_FEATURE_GATES",
            "A=x",
            r#"invalid value "A=x" for ETCD_FEATURE_GATES: invalid value of A=x, err: strconv.ParseBool: parsing "x": invalid syntax"#,
        ),
    ];
    for (key, value, error) in cases {
        assert_eq!(refusal(&[], &[(key, value)], None), error);
    }
}

#[test]
fn a_file_stands_alone() {
    let file = "NAME: from-file\nmax-wals: 1e1\nunknown: {a: 1}\npre-vote: no\n";
    let env = [("ETCD_MAX_TXN_OPS", "bad"), ("ETCD_NAME", "from-env")];
    let args = ["--config-file=x", "--name=from-flag", "--snapshot-count=1", "--raft-read-timeout=1s"];
    let (config, notices) = run(&args, &env, Some(file));
    assert_eq!((config.name.as_str(), config.max_wals, config.snapshot_count), ("from-file", 10, 10_000));
    assert!(!config.pre_vote);
    assert_eq!(config.initial_cluster, "from-file=http://localhost:2380");
    assert_eq!(config.raft_read_timeout.to_string(), "1s", "no floor beside a file");
    assert!(notices.iter().any(|notice| notice.level == Level::Info && notice.fields == [("path", "x".to_owned())]));

    let (config, _) = run(&[], &[("ETCD_CONFIG_FILE", "y")], Some(file));
    assert_eq!((config.name.as_str(), config.config_file.as_str()), ("from-file", "y"));
    assert_eq!(refusal(&["--config-file=nowhere"], &[], None), "open nowhere: no such file or directory");

    // The floor holds for flags and variables.
    assert_eq!(run(&["--raft-read-timeout=1s"], &[], None).0.raft_read_timeout.to_string(), "5s");
    assert_eq!(run(&["--raft-read-timeout=6s"], &[], None).0.raft_read_timeout.to_string(), "6s");
}

#[test]
fn values_in_files_are_typed() {
    let accepted = [
        ("snapshot-count: 0x10", "16"),
        ("snapshot-count: 1e3", "1000"),
        ("Snapshot-Count: 5", "5"),
        ("{\"snapshot-count\": 6}", "6"),
        ("snapshot-count: 7\nsnapshot-count: 8", "8"),
        ("snapshot-count: null", "10000"),
        ("", "10000"),
        ("# nothing\n", "10000"),
    ];
    for (text, count) in accepted {
        let (config, _) = run(&["--config-file=x"], &[], Some(text));
        assert_eq!(config.snapshot_count.to_string(), count, "{text}");
    }
    let refused = [
        "snapshot-count: abc",
        "snapshot-count: \"5\"",
        "snapshot-count: -1",
        "snapshot-count: 1.5",
        "max-concurrent-streams: 4294967296",
        "grpc-keepalive-interval: 10m",
        "pre-vote: 1",
        "name: 5",
        "name: true",
        "name: [1]",
        "log-outputs: stderr",
        "log-outputs: [1]",
        "auto-compaction-retention: 1",
        "client-transport-security: [1]",
        "client-transport-security: {cert-file: 5}",
        "feature-gates: A=true",
        "foo: [",
        "foo",
        "- a",
    ];
    for text in refused {
        assert!(!refusal(&["--config-file=x"], &[], Some(text)).is_empty(), "{text}");
    }
    assert_eq!(
        refusal(&["--config-file=x"], &[], Some("grpc-keepalive-interval: 10m")),
        r#"setting "grpc-keepalive-interval" in the file must be a whole number of nanoseconds, not the string "10m""#
    );
}

#[test]
fn bad_urls_in_files_are_told_on_stderr() {
    for (key, named) in [
        ("listen-peer-urls", "listen-peer-urls"),
        ("listen-client-urls", "listen-client-urls"),
        ("listen-client-http-urls", "listen-client-http-urls"),
        ("listen-metrics-urls", "listen-metrics-urls"),
        ("advertise-client-urls", "advertise-peer-urls"),
    ] {
        let exit = in_file(&format!("{key}: foo")).expect_err("refused");
        let reason = "URL scheme must be http, https, unix, or unixs: foo";
        assert_eq!(exit.stderr, format!("unexpected error setting up {named}: {reason}\n"));
        assert_eq!((exit.code, exit.notices.len()), (1, 0));
    }
}

#[test]
fn validation_has_etcds_texts() {
    let cases: &[(&[&str], &str)] = &[
        (&["--logger=x"], r#"unknown logger option "x""#),
        (&["--logger="], r#"unknown logger option """#),
        (&["--logger=capnslog"], "--logger=capnslog is removed in v3.5"),
        (&["--log-outputs="], r#"open sink "": open : no such file or directory"#),
        (&["--log-outputs=default,stdout"], r#"multi logoutput for "default" is not supported yet"#),
        (
            &["--enable-log-rotation"],
            "--log-outputs requires a single file path when --log-rotate-config-json is defined",
        ),
        (
            &["--enable-log-rotation", "--log-outputs=a,b"],
            "--log-outputs requires a single file path when --log-rotate-config-json is defined",
        ),
        (&["--listen-peer-urls=http://a.b:1"], "expected IP in URL for binding (http://a.b:1)"),
        (&["--listen-metrics-urls=http://:1"], "expected IP in URL for binding (http://:1)"),
        (
            &["--initial-advertise-peer-urls=http://a:2,http://:1"],
            r#"--initial-advertise-peer-urls "http://:1,http://a:2" must be "host:port" (unexpected empty host (http://:1))"#,
        ),
        (
            &["--advertise-client-urls=http://:1"],
            r#"--advertise-client-urls "http://:1" must be in the format "host:port", "unix:/path/to/socket" or "unixs:/path/to/socket" (unexpected empty host (http://:1))"#,
        ),
        (&["--discovery-token=a"], "both --discovery-token and --discovery-endpoints must be set"),
        (&["--discovery-endpoints=a"], "both --discovery-token and --discovery-endpoints must be set"),
        (
            &["--discovery-endpoints=a, ", "--discovery-token=b"],
            "--discovery-endpoints must not contain empty endpoints",
        ),
        (&["--heartbeat-interval=0"], "--heartbeat-interval must be >0 (set to 0ms)"),
        (&["--election-timeout=0"], "--election-timeout must be >0 (set to 0ms)"),
        (
            &["--election-timeout=499"],
            "--election-timeout[499ms] should be at least as 5 times as --heartbeat-interval[100ms]",
        ),
        (
            &["--heartbeat-interval=18446744073709551615"],
            "--election-timeout[1000ms] should be at least as 5 times as --heartbeat-interval[18446744073709551615ms]",
        ),
        (&["--election-timeout=50001"], "--election-timeout[50001ms] is too long, and should be set less than 50000ms"),
        (
            &["--listen-client-urls=http://127.0.0.1:1"],
            "--advertise-client-urls is required when --listen-client-urls is set explicitly",
        ),
        (&["--auto-compaction-mode="], "undefined auto-compaction-mode"),
        (&["--auto-compaction-mode=x"], r#"unknown auto-compaction-mode "x""#),
        (
            &["--feature-gates=LeaseCheckpointPersist=true"],
            "enabling feature gate LeaseCheckpointPersist requires enabling feature gate LeaseCheckpoint",
        ),
        (&["--compact-hash-check-time=0"], "--compact-hash-check-time must be >0 (set to 0s)"),
        (&["--compact-hash-check-time=-90s"], "--compact-hash-check-time must be >0 (set to -1m30s)"),
        (&["--tls-min-version=x"], r#"unexpected TLS version "x" (must be one of: TLS1.2, TLS1.3)"#),
        (&["--tls-max-version=TLS1.1"], r#"unexpected TLS version "TLS1.1" (must be one of: TLS1.2, TLS1.3)"#),
        (
            &["--tls-min-version=TLS1.3", "--tls-max-version=TLS1.2"],
            "min version (TLS1.3) is greater than max version (TLS1.2)",
        ),
        (
            &["--tls-min-version=TLS1.3", "--cipher-suites=a"],
            "cipher suites cannot be configured when only TLS1.3 is enabled",
        ),
    ];
    for (args, error) in cases {
        assert_eq!(refusal(args, &[], None), *error);
    }
    for args in [
        &["--discovery-srv=a", "--initial-cluster=b=http://1.1.1.1:1"][..],
        &["--discovery-srv=a", "--discovery-endpoints=b", "--discovery-token=c"],
    ] {
        assert_eq!(
            refusal(args, &[], None),
            "multiple discovery or bootstrap flags are set. Choose one of \"initial-cluster\", \"discovery-endpoints\" or \
             \"discovery-srv\"",
            "{args:?}"
        );
    }
    assert_eq!(
        refusal(&["--discovery-fallback=proxy"], &[], None),
        r#"v2 proxy is deprecated, and --discovery-fallback can't be configured as "proxy""#
    );
    for args in [
        &["--log-level=x"][..],
        &["--log-format=x"],
        &["--log-outputs=a,"],
        &["--enable-log-rotation", "--log-outputs=a", "--log-rotation-config-json={"],
        &["--enable-distributed-tracing", "--distributed-tracing-sampling-rate=1000001"],
        &["--enable-distributed-tracing", "--distributed-tracing-sampling-rate=-1"],
    ] {
        assert!(!refusal(args, &[], None).is_empty(), "{args:?}");
    }
    assert_eq!(
        refusal(&["--config-file=x"], &[], Some("initial-cluster-state: foo")),
        r#"unexpected clusterState "foo""#
    );
}

/// Of all mistakes made at once, the one checked first is told; it is mended, and the next one shows.
#[test]
fn the_first_failure_wins() {
    let mistakes = [
        ("discovery-fallback", "proxy", "exit", "v2 proxy is deprecated"),
        ("logger", "x", "zap", "unknown logger"),
        ("log-outputs", "default,a", "stderr", "multi logoutput"),
        ("listen-peer-urls", "http://a:1", "http://127.0.0.1:1", "expected IP"),
        ("initial-advertise-peer-urls", "http://:1", "http://a:1", "--initial-advertise-peer-urls"),
        ("initial-cluster", "a=http://a:1", "", "multiple discovery"),
        ("discovery-endpoints", "a", "", "both --discovery-token"),
        ("heartbeat-interval", "0", "100", "--heartbeat-interval"),
        ("election-timeout", "0", "1000", "--election-timeout must"),
        ("listen-client-urls", "http://127.0.0.1:2", "", "--advertise-client-urls is required"),
        ("auto-compaction-mode", "", "periodic", "undefined"),
        ("distributed-tracing-sampling-rate", "-1", "1", "--distributed-tracing-sampling-rate"),
        ("feature-gates", "LeaseCheckpointPersist=true", "", "enabling feature gate"),
        ("compact-hash-check-time", "0s", "1s", "--compact-hash-check-time"),
        ("tls-min-version", "x", "TLS1.3", "unexpected TLS version"),
        ("tls-max-version", "TLS1.2", "TLS1.3", "min version"),
        ("cipher-suites", "a", "", "cipher suites"),
    ];
    let base = ["--enable-distributed-tracing".to_owned()];
    for mended in 0..mistakes.len() {
        let args = mistakes.iter().enumerate().filter_map(|(at, (flag, bad, good, _))| match at < mended {
            // A flag without a good value of its own is left out.
            true if good.is_empty() => None,
            true => Some(format!("--{flag}={good}")),
            false => Some(format!("--{flag}={bad}")),
        });
        let args: Vec<String> = base.iter().cloned().chain(args).collect();
        let error = refusal(&args.iter().map(String::as_str).collect::<Vec<_>>(), &[], None);
        assert!(error.starts_with(mistakes[mended].3), "{args:?}: {error}");
    }
}

#[test]
fn listeners_with_tls_are_refused_not_served_in_plaintext() {
    for arg in [
        "--listen-peer-urls=https://127.0.0.1:1",
        "--listen-metrics-urls=https://127.0.0.1:1",
        "--listen-client-http-urls=unixs://a:1",
        "--listen-client-urls=http://127.0.0.1:2,https://127.0.0.1:1",
    ] {
        let exit = exit(&[arg, "--advertise-client-urls=http://127.0.0.1:2"], &[], None);
        let last = exit.notices.last().expect("a line");
        assert_eq!((exit.code, last.level), (1, Level::Fatal));
        assert!(last.fields[0].1.contains("not implemented yet"), "{last:?}");
    }
}

#[test]
fn what_cannot_be_served_ends_the_start() {
    for (args, error) in [
        (&["--auto-compaction-retention=x"][..], r#"error parsing CompactionRetention: time: invalid duration "x""#),
        (
            &["--auto-compaction-retention=-1"],
            r#"error parsing CompactionRetention: time: missing unit in duration "-1""#,
        ),
        (&["--auth-token=x"], "unknown token provider"),
        (&["--peer-cert-allowed-cn=a", "--peer-cert-allowed-hostname=b"], "--peer-cert-allowed-cn and"),
        (&["--listen-client-http-urls=http://localhost:2379"], "http://localhost:2379 is both in"),
    ] {
        let exit = exit(args, &[], None);
        let last = exit.notices.last().expect("a line");
        assert_eq!((exit.code, last.level), (1, Level::Fatal), "{args:?}");
        assert!(last.fields[0].1.starts_with(error), "{last:?}");
    }
}

#[test]
fn defaults_follow_what_they_depend_on() {
    let (config, _) = run(&["--name=a", "--initial-advertise-peer-urls=http://h:2,http://h:1"], &[], None);
    assert_eq!(config.initial_cluster, "a=http://h:1,a=http://h:2");
    assert_eq!(config.data_dir, "a.etcd");
    assert_eq!(config.wal_path(), std::path::Path::new("a.etcd/member/wal"));

    for by_dns in ["--discovery-srv=x", "--discovery-srv-name=x"] {
        let (config, _) = run(&[by_dns], &[], None);
        assert_eq!(config.initial_cluster, "");
    }
    let (config, _) = run(&["--config-file=x"], &[], Some("discovery-srv-name: x\n"));
    assert_eq!(config.initial_cluster, "default=http://localhost:2380");

    // In a file, the listeners leave the advertised URLs alone.
    let (config, _) =
        run(&["--config-file=x"], &[], Some("listen-client-urls: http://127.0.0.1:1\nself-signed-cert-validity: 0\n"));
    assert_eq!(actd::config::url::join(&config.advertise_client_urls), "http://localhost:2379");
    assert_eq!(config.self_signed_cert_validity_years, 1);

    let all = ["--listen-peer-urls=http://0.0.0.0:5", "--listen-client-urls=http://0.0.0.0:6"];
    let (mut config, _) = run(&[all[0], all[1], "--advertise-client-urls=http://localhost:2379"], &[], None);
    assert!(config.wants_default_host());
    config.adopt_default_host("10.0.0.7");
    assert_eq!(config.initial_cluster, "default=http://10.0.0.7:5");
    assert_eq!(actd::config::url::join(&config.initial_advertise_peer_urls), "http://10.0.0.7:5");
    assert_eq!(actd::config::url::join(&config.advertise_client_urls), "http://10.0.0.7:6");
    assert!(!config.wants_default_host());
}

#[test]
fn other_members_are_dialled_from_an_address_told_to_them() {
    let from = |gate: &str, urls: &str| {
        let urls = format!("--initial-advertise-peer-urls={urls}");
        let members =
            format!("--initial-cluster=default={}", urls.split_once('=').expect("a value").1.replace(',', ",default="));
        run(&[gate, &urls, &members], &[], None).0.local_address().map(|address| address.to_string())
    };
    let gate = "--feature-gates=SetMemberLocalAddr=true";
    let urls = "http://127.0.0.1:1,http://localhost:2,http://10.1.2.3:3,http://10.1.2.4:4";
    assert_eq!(from(gate, urls).as_deref(), Some("10.1.2.3"));
    assert_eq!(from(gate, "http://[::1]:1,http://[fd00::1]:2").as_deref(), Some("fd00::1"));
    assert_eq!(from(gate, "http://[::1]:1"), None);
    assert_eq!(from("--feature-gates=SetMemberLocalAddr=false", urls), None);
}

#[test]
fn retention_counts_hours_durations_or_revisions() {
    use actd::config::Retention;
    let cases = [
        ("periodic", "0", "Off"),
        ("periodic", "0s", "Off"),
        ("periodic", "1", "Period 1h0m0s"),
        ("periodic", "10m", "Period 10m0s"),
        ("revision", "1000", "Revisions 1000"),
        ("revision", "1us", "Revisions 1000"),
        ("revision", "0", "Off"),
    ];
    for (mode, text, meaning) in cases {
        let args = [format!("--auto-compaction-mode={mode}"), format!("--auto-compaction-retention={text}")];
        let (config, _) = run(&[&args[0], &args[1]], &[], None);
        let found = match config.retention().expect("loads") {
            Retention::Off => "Off".to_owned(),
            Retention::Period(period) => format!("Period {period}"),
            Retention::Revisions(count) => format!("Revisions {count}"),
        };
        assert_eq!(found, meaning, "{mode} {text}");
    }
}

#[test]
fn zero_stands_for_a_value_in_some_settings() {
    let (config, _) = run(&["--warning-unary-request-duration=0"], &[], None);
    assert_eq!(config.quota(), Some(2 << 30));
    assert_eq!(config.compaction_batch(), 200);
    assert_eq!(config.compaction_pause().as_millis(), 0);
    assert_eq!(config.watch_progress_interval().as_secs(), 600);
    assert_eq!(config.slow_unary_request().as_millis(), 300);
    assert_eq!(config.election_ticks(), 10);
    let (config, _) =
        run(&["--quota-backend-bytes=-1", "--watch-progress-notify-interval=1ms", "--bcrypt-cost=3"], &[], None);
    assert_eq!((config.quota(), config.watch_progress_interval().as_millis(), config.bcrypt_cost()), (None, 100, 10));
    assert_eq!(run(&["--grpc-keepalive-timeout=0"], &[], None).0.server_pings(), None);
    assert_eq!(run(&["--grpc-keepalive-min-time=0s"], &[], None).0.least_ping_gap().as_secs(), 300);
}

#[test]
fn remarks_stop_nothing() {
    let cases = [
        ("--max-snapshots=1", "--max-snapshots is deprecated in 3.6 and will be decommissioned in 3.8"),
        (
            "--v2-deprecation=gone",
            "--v2-deprecation is deprecated and scheduled for removal in v3.8. The default value is enforced, \
             ignoring user input",
        ),
        ("--max-request-bytes=10485761", "--max-request-bytes is above 10 MiB; requests of that size delay all others"),
        ("--quota-backend-bytes=8589934593", "--quota-backend-bytes is above 8 GiB"),
    ];
    for (arg, message) in cases {
        let (config, notices) = run(&[arg], &[], None);
        assert_eq!(notices.iter().filter(|notice| notice.message == message).count(), 1, "{arg}");
        assert_eq!(config.v2_deprecation, "write-only");
    }
    let (_, notices) = run(&["--v=3"], &[], None);
    assert!(notices.iter().any(|notice| notice.fields == [("flag", "v".to_owned())]));
}
