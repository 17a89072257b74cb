//! Texts for people: usage, the list of flags, the version.

use super::flags::{self, Flag, Kind, Reach};
use super::{ETCD_VERSION, gates};

const WIDTH: usize = 100;

pub fn usage() -> String {
    let lines = [
        ("actd [flags]", "Start a member."),
        ("actd --version", "Print the version."),
        ("actd -h | --help", "Print all flags and what they do."),
        (
            "actd --config-file=path",
            "Start a member with the settings of a file; other flags and variables are ignored.",
        ),
    ];
    let mut text = String::from("Usage:\n\n");
    for (command, meaning) in lines {
        text += &format!("  {command}\n    {meaning}\n\n");
    }
    text
}

/// Every flag with its default and its meaning, by group.
pub fn all_flags() -> String {
    let mut text = String::from(
        "Each flag can also be set by a variable: --data-dir by ETCD_DATA_DIR. A flag and its variable exclude each\n\
         other. Durations are written like 300ms or 1h30m, lists with commas, URLs like http://127.0.0.1:2379.\n",
    );
    for group in flags::TABLE {
        text += &format!("\n{}:\n", group.title);
        text += &wrap(group.about, 2);
        for flag in group.flags.iter().filter(|flag| !matches!(flag.kind, Kind::Ignored)) {
            text += &describe(flag);
        }
    }
    text += "\nFeature gates, for --feature-gates:\n";
    for gate in gates::GATES {
        text += &format!("\n  {}={} ({})\n", gate.name, gate.default, gate.stage.name());
        text += &wrap(gate.help, 4);
    }
    let ignored: Vec<_> = flags::all().filter(|flag| matches!(flag.kind, Kind::Ignored)).map(|f| f.name).collect();
    text += "\nAccepted without effect, for old start scripts:\n";
    text += &wrap(&ignored.join(", "), 2);
    text
}

fn describe(flag: &Flag) -> String {
    let default = match flag.kind {
        Kind::Bool(_) | Kind::Uint(_) | Kind::Uint32(_) | Kind::Int(_) | Kind::Duration(_) => flag.default.to_owned(),
        _ => format!("'{}'", flag.default),
    };
    let mut text = format!("\n  --{}={default}\n{}", flag.name, wrap(flag.help, 4));
    if let Reach::Accepted { waiting_for } = flag.reach {
        text += &wrap(&format!("(no effect yet, waits for {waiting_for})"), 4);
    }
    text
}

/// Lines of at most `WIDTH` columns, indented.
fn wrap(text: &str, indent: usize) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && indent + line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines += &format!("{:indent$}{line}\n", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line += word;
    }
    if !line.is_empty() {
        lines += &format!("{:indent$}{line}\n", "");
    }
    lines
}

/// Four lines under the names that tools read; where etcd tells its compiler, ours says what it is built with.
pub fn version() -> String {
    let git_sha = option_env!("ACTD_GIT_SHA").unwrap_or("unknown");
    let (own, os, arch) = (env!("CARGO_PKG_VERSION"), std::env::consts::OS, go_arch());
    format!(
        "etcd Version: {ETCD_VERSION}\nGit SHA: {git_sha}\nGo Version: none (actd {own}, Rust)\nGo OS/Arch: {os}/{arch}\n"
    )
}

fn go_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}
