//! The table of flags against `data/flags.tsv`, and every flag through each of the three sources.

use actd::config::flags::{self, Flag, Kind};
use actd::config::{Config, Exit, Loaded, Notice, load};
use std::collections::{BTreeMap, BTreeSet};

struct Row {
    name: String,
    env: String,
    key: String,
    kind: String,
    default: String,
    status: String,
}

fn rows() -> Vec<Row> {
    let table = include_str!("data/flags.tsv");
    let rows = table.lines().skip(1).map(|line| {
        let columns: Vec<&str> = line.split('\t').collect();
        let [flag, env, key, kind, default, _, _, _, status] = columns[..] else { panic!("columns of {line}") };
        let none = |text: &str| if text == "(none)" { String::new() } else { text.to_owned() };
        Row {
            name: flag.trim_start_matches("--").to_owned(),
            env: env.to_owned(),
            key: none(key),
            kind: kind.to_owned(),
            default: plain_default(&none(default)),
            status: status.to_owned(),
        }
    });
    rows.collect()
}

/// Without the remarks in parentheses.
fn plain_default(text: &str) -> String {
    text.split('(').next().unwrap_or_default().trim().to_owned()
}

fn settings() -> impl Iterator<Item = Row> {
    rows().into_iter().filter(|row| !row.name.contains('='))
}

#[test]
fn the_table_is_complete() {
    let expected: BTreeSet<String> = settings().map(|row| row.name).collect();
    let found: BTreeSet<String> = flags::all().map(|flag| flag.name.to_owned()).collect();
    assert_eq!(found, expected);
    assert_eq!(flags::all().count(), found.len(), "a flag is listed twice");
}

#[test]
fn names_keys_and_defaults_are_etcds() {
    for row in settings() {
        let flag = flags::find(&row.name).expect("complete");
        assert_eq!(flag.env(), row.env);
        assert_eq!(flag.key, row.key, "{}", row.name);
        assert_eq!(flag.default, row.default, "{}", row.name);
        assert!(!flag.help.is_empty(), "{}", row.name);
    }
}

#[test]
fn kinds_are_etcds() {
    for row in settings() {
        let flag = flags::find(&row.name).expect("complete");
        let fits = match row.kind.as_str() {
            "string" => matches!(flag.kind, Kind::Text(_) | Kind::Choice { .. }),
            "bool" => matches!(flag.kind, Kind::Bool(_)),
            "uint" | "uint64" => matches!(flag.kind, Kind::Uint(_)),
            "uint32" => matches!(flag.kind, Kind::Uint32(_)),
            "int" | "int64" => matches!(flag.kind, Kind::Int(_)),
            "duration" => matches!(flag.kind, Kind::Duration(_)),
            "URL list" => matches!(flag.kind, Kind::Urls(_) | Kind::Origins(_)),
            "string list" => matches!(flag.kind, Kind::List(_) | Kind::Words(_)),
            "k=v list" => matches!(flag.kind, Kind::Gates),
            "any" => matches!(flag.kind, Kind::Ignored),
            other => panic!("unknown kind {other}"),
        };
        assert!(fits, "{} is no {}", row.name, row.kind);
    }
}

#[test]
fn gates_are_etcds() {
    let listed: BTreeMap<String, (String, String)> = rows()
        .into_iter()
        .filter_map(|row| {
            let gate = row.name.strip_prefix("feature-gates=")?;
            Some((gate.to_owned(), (row.default, row.status)))
        })
        .collect();
    let found: BTreeMap<String, (String, String)> = actd::config::gates::GATES
        .iter()
        .map(|gate| {
            let status = format!("feature-gate ({})", gate.stage.name().to_lowercase());
            (gate.name.to_owned(), (gate.default.to_string(), status))
        })
        .collect();
    assert_eq!(found, listed);
}

#[test]
fn the_text_of_every_default_means_the_default() {
    for flag in flags::all().filter(|flag| !matches!(flag.kind, Kind::Ignored)) {
        let mut config = Config::default();
        flag.kind.set(&mut config, flag.default).unwrap_or_else(|e| panic!("{}: {e}", flag.name));
        assert_eq!(config, Config::default(), "{}", flag.name);
    }
}

/// A good value that is not the default: as written on a command line, and in a file.
fn other_value(flag: &Flag) -> (String, String) {
    let same = |text: &str| (text.to_owned(), text.to_owned());
    let named = match flag.name {
        "initial-cluster-state" => Some(same("existing")),
        "v2-deprecation" => Some(same("gone")),
        "auto-compaction-mode" => Some(same("revision")),
        "auto-compaction-retention" => Some(("5h".into(), "\"5h\"".into())),
        "log-level" => Some(same("debug")),
        "log-format" => Some(same("console")),
        "tls-min-version" | "tls-max-version" => Some(same("TLS1.3")),
        "election-timeout" => Some(same("2000")),
        "heartbeat-interval" => Some(same("50")),
        "auth-token" => Some(same("jwt")),
        "listen-peer-urls" | "listen-client-urls" | "listen-client-http-urls" | "listen-metrics-urls" => {
            Some(same("http://127.0.0.1:12345,http://[::1]:12345"))
        }
        "discovery-srv" => Some(same("example.org")),
        "logger" | "discovery-fallback" => Some(same(flag.default)),
        _ => None,
    };
    named.unwrap_or_else(|| match flag.kind {
        Kind::Text(_) | Kind::Choice { .. } => same("other"),
        Kind::Bool(_) => same(if flag.default == "true" { "false" } else { "true" }),
        Kind::Uint(_) | Kind::Uint32(_) | Kind::Int(_) => same("77"),
        Kind::Duration(_) => ("11m".into(), "660000000000".into()),
        Kind::Urls(_) | Kind::Origins(_) => same("http://example.org:1"),
        Kind::Words(_) => same("a,b"),
        Kind::List(_) => ("a,b".into(), "[a, b]".into()),
        Kind::Gates => same("LeaseCheckpoint=true"),
        Kind::Ignored => same("x"),
    })
}

fn run(args: &[String], env: &[(String, String)], file: &str) -> Result<(Config, Vec<Notice>), Exit> {
    match load(args.to_vec(), env.to_vec(), |_| Ok(file.to_owned()))? {
        Loaded::Run(config, notices) => Ok((*config, notices)),
        Loaded::Print { .. } => panic!("{args:?} prints"),
    }
}

/// The settings some flags need beside them.
fn companions(name: &str) -> &'static [&'static str] {
    match name {
        "listen-client-urls" => &["advertise-client-urls"],
        "discovery-endpoints" => &["discovery-token"],
        "discovery-token" => &["discovery-endpoints"],
        "enable-log-rotation" => &["log-outputs"],
        _ => &[],
    }
}

fn as_file(flag: &Flag, value: &str) -> String {
    let mut text = String::new();
    let keys: Vec<&str> = flag.key.split('.').collect();
    for (depth, key) in keys.iter().enumerate() {
        text += &format!("{:width$}{key}:", "", width = depth * 2);
        text += if depth + 1 == keys.len() { " " } else { "\n" };
    }
    text + value + "\n"
}

#[test]
fn every_flag_is_read_from_each_source() {
    for flag in flags::all().filter(|flag| !["config-file", "version"].contains(&flag.name)) {
        let (text, in_file) = other_value(flag);
        let mut with: Vec<(&Flag, String, String)> = vec![(flag, text.clone(), in_file)];
        for name in companions(flag.name) {
            let flag = flags::find(name).expect("a flag");
            let (text, in_file) = match *name {
                "log-outputs" => ("file.log".to_owned(), "[file.log]".to_owned()),
                _ => other_value(flag),
            };
            with.push((flag, text, in_file));
        }

        let args: Vec<String> = with.iter().map(|(flag, text, _)| format!("--{}={text}", flag.name)).collect();
        let (by_flag, _) = run(&args, &[], "").unwrap_or_else(|e| panic!("--{}: {e:?}", flag.name));
        let same_but = |config: &Config| *config != run(&[], &[], "").expect("defaults load").0;
        let unchanged = matches!(flag.name, "logger" | "discovery-fallback" | "v2-deprecation")
            || matches!(flag.kind, Kind::Ignored);
        assert_eq!(same_but(&by_flag), !unchanged, "--{} has no effect", flag.name);

        let env: Vec<(String, String)> = with.iter().map(|(flag, text, _)| (flag.env(), text.clone())).collect();
        let (by_variable, notices) = run(&[], &env, "").unwrap_or_else(|e| panic!("{}: {e:?}", flag.env()));
        assert_eq!(by_variable, by_flag, "{}", flag.env());
        let used = |notice: &Notice| {
            notice.message == "recognized and used environment variable"
                && notice.fields == [("variable-name", flag.env()), ("variable-value", text.clone())]
        };
        assert_eq!(notices.iter().filter(|notice| used(notice)).count(), 1, "{}", flag.env());

        if flag.key.is_empty() {
            continue;
        }
        // Companions that share a block must be written into one.
        let file = match flag.name {
            "discovery-endpoints" | "discovery-token" => {
                "discovery-config:\n  token: other\n  client:\n    endpoints: [a, b]\n".to_owned()
            }
            _ => with.iter().map(|(flag, _, in_file)| as_file(flag, in_file)).collect(),
        };
        let (mut by_file, _) = run(&["--config-file=x".into()], &[], &file).unwrap_or_else(|e| panic!("{file}{e:?}"));
        by_file.config_file = String::new();
        if flag.name == "discovery-srv-name" {
            // In a file it alone does not drop the default list of members.
            by_file.initial_cluster = String::new();
        }
        assert_eq!(by_file, by_flag, "{file}");
    }
}

#[test]
fn settings_that_do_not_act_yet_are_named_in_one_line() {
    let args = ["--pre-vote", "--cert-file=a", "--memory-mlock", "--name=x"].map(String::from);
    let (_, notices) = run(&args, &[], "").expect("loads");
    let lines: Vec<_> = notices.iter().filter(|notice| notice.message == "settings that do not act yet").collect();
    assert_eq!(lines.len(), 1);
    assert_eq!(
        lines[0].fields,
        [("flags", "--memory-mlock (nothing: the storage engine has no such setting), --cert-file (TLS)".to_owned())]
    );
    let gates = ["--feature-gates=AllAlpha=true".to_owned()];
    let (_, notices) = run(&gates, &[], "").expect("loads");
    let line = notices.iter().find(|notice| notice.message == "settings that do not act yet").expect("a line");
    let named = "--feature-gates=StopGRPCServiceOnDefrag (nothing: a defragmentation holds up nobody)";
    assert_eq!(line.fields, [("flags", named.to_owned())]);
    let (_, notices) = run(&args[3..], &[], "").expect("loads");
    assert!(notices.iter().all(|notice| notice.message != "settings that do not act yet"));
}

/// Block and name of the one field that differs from the default, as `Debug` shows it.
fn changed_field(config: &Config) -> (String, String) {
    let (old, new) = (format!("{:#?}", Config::default()), format!("{config:#?}"));
    let lines: Vec<&str> = new.lines().collect();
    let at = old.lines().zip(&lines).position(|(old, new)| old != *new).expect("a difference");
    let indent = |line: &str| line.len() - line.trim_start().len();
    let name = |line: &str| line.trim_start().split(':').next().unwrap_or_default().to_owned();
    let top = lines[..=at].iter().rfind(|line| indent(line) == 4).expect("a field");
    // Inside a list or a wrapped value, the field is the line above that names one.
    let is_field = |line: &&&str| line.contains(": ") && line.trim_start().starts_with(|c: char| c.is_lowercase());
    let inner = lines[..=at].iter().filter(|line| indent(line) <= 8).rfind(is_field).expect("a field");
    (name(top), name(inner))
}

#[test]
fn every_flag_goes_to_the_field_of_its_name() {
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    for flag in flags::all() {
        let mut config = Config::default();
        let value = if matches!(flag.name, "logger" | "version") { "true".to_owned() } else { other_value(flag).0 };
        let value = if flag.name == "discovery-fallback" { "proxy".to_owned() } else { value };
        flag.kind.set(&mut config, &value).unwrap_or_else(|e| panic!("{}: {e}", flag.name));
        if matches!(flag.kind, Kind::Ignored | Kind::Gates) {
            continue;
        }
        let (top, inner) = changed_field(&config);
        if let Some(other) = seen.insert(format!("{top}.{inner}"), flag.name) {
            panic!("{} and {other} set the same field", flag.name);
        }
        let name = flag.name.replace('-', "_");
        let field = ["_ms", "_secs", "_years"].iter().fold(inner.as_str(), |field, unit| field.trim_end_matches(unit));
        let exception = flag.name == "enable-distributed-tracing" && inner == "enabled";
        assert!(exception || name.ends_with(field) || field.ends_with(&name), "{} sets {top}.{inner}", flag.name);
        assert_eq!(flag.name.starts_with("peer-"), top == "peer_tls", "{} sets {top}.{inner}", flag.name);
    }
}
