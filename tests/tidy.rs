//! What no lint sees: where locks, clocks and sockets may be, which module may name which, no stray marks.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Every `.rs` file below `dir`, with its text.
fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut open = vec![root.join(dir)];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target" && name != "node_modules") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root).unwrap().to_owned(), text));
            }
        }
    }
    assert!(!found.is_empty(), "{dir} has sources");
    found
}

/// The code of a file: without lines of comment, and without its tests.
fn code(text: &str) -> String {
    let mut text = text.to_owned();
    for begin in ["#[cfg(test)]\nmod tests {", "#[cfg(test)]\npub(super) mod tests {"] {
        while let Some(from) = text.find(begin) {
            let end = text[from..].find("\n}").map_or(text.len(), |end| from + end + 2);
            text.replace_range(from..end, "");
        }
    }
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

fn is_test(path: &Path) -> bool {
    let name = path.to_string_lossy();
    ["tests", "model", "simulation", "support", "contract"].iter().any(|word| name.contains(word))
}

/// Files of `dirs` (tests left out) whose code holds one of `words`, as "file: word".
fn offences(dirs: &[&str], words: &[&str], except: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in dirs.iter().flat_map(|dir| sources(dir)) {
        if is_test(&path) || except.iter().any(|e| path.ends_with(e)) {
            continue;
        }
        let code = code(&text);
        found.extend(words.iter().filter(|w| code.contains(**w)).map(|w| format!("{}: {w}", path.display())));
    }
    found
}

#[test]
fn no_locks_where_the_design_forbids_them() {
    let dirs = ["src/mvcc", "src/apply", "src/watch", "src/raft"];
    let found = offences(&dirs, &["Mutex", "RwLock", "parking_lot"], &[]);
    assert!(found.is_empty(), "locks: {found:#?}");
}

/// What the simulation runs.
const CORES: [&str; 8] =
    ["src/mvcc", "src/apply", "src/watch", "src/raft", "src/lease", "src/cluster", "src/wal", "src/snapshot"];

/// A clock, random numbers, files, sockets and threads by any of these names. `Instant` alone is what a turn gives.
const SEAMS: [&str; 17] = [
    "SystemTime",
    "UNIX_EPOCH",
    "elapsed",
    "rand",
    "getrandom",
    "RandomState",
    "fs",
    "OpenOptions",
    "net",
    "UdpSocket",
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "UnixListener",
    "UnixDatagram",
    "thread",
    "socket2",
];

/// Names and signs of a text without comments and strings, each with the number of its line.
fn tokens(text: &str) -> Vec<(usize, String)> {
    let chars: Vec<char> = text.chars().collect();
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let starts = |at: usize, sign: &str| sign.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    let (mut found, mut at, mut line) = (Vec::new(), 0, 1);
    while at < chars.len() {
        let begin = at;
        let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
        if starts(at, "//") {
            at += chars[at..].iter().take_while(|c| **c != '\n').count();
        } else if starts(at, "/*") {
            at += 2;
            while at < chars.len() && !starts(at, "*/") {
                at += 1;
            }
            at += 2;
        } else if chars[at] == 'r' && chars.get(at + 1 + hashes) == Some(&'"') {
            let end = format!("\"{}", "#".repeat(hashes));
            at += hashes + 2;
            while at < chars.len() && !starts(at, &end) {
                at += 1;
            }
            at += end.len();
        } else if chars[at] == '"' {
            at += 1;
            while at < chars.len() && chars[at] != '"' {
                at += if chars[at] == '\\' { 2 } else { 1 };
            }
            at += 1;
        } else if chars[at] == '\'' {
            // A character; else it is the name of a lifetime.
            let is_escaped = starts(at + 1, "\\");
            at += if is_escaped {
                3 + chars[at + 3..].iter().take_while(|c| **c != '\'').count() + 1
            } else if chars.get(at + 2) == Some(&'\'') {
                3
            } else {
                1
            };
        } else if is_name(chars[at]) {
            at += chars[at..].iter().take_while(|c| is_name(**c)).count();
            found.push((line, chars[begin..at].iter().collect()));
        } else {
            at += if starts(at, "::") { 2 } else { 1 };
            if !chars[begin].is_whitespace() {
                found.push((line, chars[begin..at].iter().collect()));
            }
        }
        line += chars[begin..at.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    found
}

/// Lines of a core that pass its seams by, with the word that does.
fn passes(code: &str) -> Vec<(usize, String)> {
    let tokens = tokens(code);
    let word = |at: usize| tokens.get(at).map_or("", |(_, word)| word.as_str());
    let mut found = Vec::new();
    // Depth of the braces in which names of tokio are listed.
    let (mut of_tokio, mut of_type) = (0, false);
    for (at, (line, name)) in tokens.iter().enumerate() {
        let follows = at > 0 && word(at - 1) == "::";
        let is_in_tokio = follows && at > 1 && word(at - 2) == "tokio" || of_tokio > 0;
        match name.as_str() {
            "{" if is_in_tokio => of_tokio += 1,
            "}" if of_tokio > 0 => of_tokio -= 1,
            "type" => of_type = true,
            ";" => of_type = false,
            _ => {}
        }
        let is_seam = SEAMS.contains(&name.as_str())
            || follows && name == "now"
            || name == "Instant" && (of_type || word(at + 1) == "as")
            || name == "tokio" && word(at + 1) == "as"
            || is_in_tokio && ["time", "net", "fs", "spawn", "spawn_blocking", "task", "*"].contains(&name.as_str());
        if is_seam {
            found.push((*line, name.clone()));
        }
    }
    found
}

#[test]
fn cores_see_no_clock_no_random_numbers_no_files_no_sockets() {
    // Not run by the simulation: shells, and what is behind a seam.
    let shells = ["watch/shell.rs", "wal/disk.rs"];
    // What only measures, and a reader for files beside one for memory: these lines, word for word.
    let known_lines: &[(&str, &str)] = &[
        ("apply/actor.rs", "time::{Duration, Instant, SystemTime},"),
        ("apply/actor.rs", "SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())"),
        ("apply/actor.rs", "clock: Laps(Instant::now()),"),
        ("apply/actor.rs", "let began = Instant::now();"),
        ("apply/actor.rs", "counts.store_commit.record(began.elapsed());"),
        ("apply/actor.rs", "let took = self.clock.end(Instant::now());"),
        ("apply/actor.rs", "self.compacting_since.get_or_insert_with(Instant::now);"),
        ("apply/actor.rs", "let slice = Instant::now();"),
        ("apply/actor.rs", "self.wiring.metrics.compaction_pauses.record_ms(slice.elapsed());"),
        ("apply/actor.rs", "let (took, view) = (began.elapsed(), self.wiring.view.load());"),
        ("bbolt/reader.rs", "use std::{fs::File, io, os::unix::fs::FileExt};"),
        ("snapshot/mod.rs", "let began = Instant::now();"),
        ("snapshot/mod.rs", "self.wiring.metrics.store_sync.record(began.elapsed());"),
    ];
    let mut used = vec![false; known_lines.len()];
    let mut found = Vec::new();
    for (path, text) in CORES.iter().flat_map(|dir| sources(dir)) {
        if is_test(&path) || shells.iter().any(|shell| path.ends_with(shell)) {
            continue;
        }
        let code = code(&text);
        for (number, word) in passes(&code) {
            let line = code.lines().nth(number - 1).unwrap_or_default().trim();
            match known_lines.iter().position(|(file, known)| path.ends_with(file) && line == *known) {
                Some(at) => used[at] = true,
                None => found.push(format!("{}: {word} in: {line}", path.display())),
            }
        }
    }
    assert!(found.is_empty(), "seams passed by: {found:#?}");
    let stale: Vec<_> = known_lines.iter().zip(used).filter(|(_, used)| !used).collect();
    assert!(stale.is_empty(), "allowed, and not there any more: {stale:#?}");
}

#[test]
fn no_other_name_hides_what_passes_a_seam() {
    let bad = [
        "fn f(turn: &Turn) { turn.now.elapsed(); }",
        "fn f() { let now = Instant::now(); }",
        "fn f() { <Instant>::now(); }",
        "use std::time::Instant as I;\nfn f() { I::now(); }",
        "use std::time::Instant as I;",
        "type Clock = std::time::Instant;",
        "use std::{time::{Duration, SystemTime as T}};",
        "use std::{ fs, io };\nfn f() { drop(fs::remove_file(p)); }",
        "fn f() { Ok(fs::read(p)) }",
        "use std::{io, net::UdpSocket};",
        "use std::os::unix::net::UnixStream;",
        "fn f() -> u8 { rand::random() }",
        "use std::hash::RandomState;",
        "use std::collections::hash_map::{Entry, RandomState};",
        "fn f() { tokio::time::sleep(d); }",
        "use tokio::{\n    sync::{mpsc, oneshot},\n    time,\n};",
        "fn f() { tokio::spawn(task); }",
        "use std::thread;",
        "#[cfg(test)]\nmod tests {\n    fn g() {}\n}\n\nfn f() { Instant::now(); }",
        "const QUOTE: char = '\"';\nfn f() { Instant::now(); }",
        "const TEXT: &str = r#\"a \" b\"#;\nfn f<'a>(x: &'a str) { Instant::now(); }",
        "/* a\n clock */ use std::fs;",
    ];
    for text in bad {
        assert!(!passes(&code(text)).is_empty(), "not seen: {text}");
    }
    let good = [
        "use std::time::{Duration, Instant};\nfn f(turn: &Turn) { turn.now + Duration::from_secs(1); }",
        "// Instant::now()\nfn f() { log(\"Instant::now() elapsed\"); }",
        "use tokio::sync::{mpsc, oneshot};\nuse crate::time;",
        "#[cfg(test)]\nmod tests {\n    fn g() { Instant::now(); }\n}",
        "struct Offset { now: Instant, type_: u8 }",
    ];
    for text in good {
        assert_eq!(passes(&code(text)), [], "seen: {text}");
    }
}

/// The order of a hash map differs from run to run, so none may be walked where that shows. These are only looked into,
/// or sorted behind.
#[test]
fn hash_maps_in_cores_are_known() {
    let known = [
        "raft/core.rs",         // snapshots under way: their smallest index
        "raft/reads.rs",        // contexts: looked up
        "lease/state.rs",       // the lease of a key: looked up
        "lease/expirer.rs",     // timers: looked up; sorted for the list
        "lease/checkpoints.rs", // looked up
        "watch/key_index.rs",   // watchers of a key: looked up
        "watch/shell.rs",       // a shell
        "lease/actor.rs",       // a shell
    ];
    let found = offences(&CORES, &["HashMap", "HashSet"], &known);
    assert!(found.is_empty(), "hash maps whose order may show: {found:#?}");
    // Theirs are of `sim`, whose order is the same in every simulated run.
    let mut found = Vec::new();
    for (path, text) in CORES.iter().flat_map(|dir| sources(dir)).filter(|(path, _)| !path.ends_with("watch/shell.rs"))
    {
        let code = code(&text);
        let of_std = code.split("use std").skip(1).filter_map(|rest| rest.split(';').next());
        if !is_test(&path) && of_std.into_iter().any(|names| names.contains("HashMap") || names.contains("HashSet")) {
            found.push(path);
        }
    }
    assert!(found.is_empty(), "hash maps of std in cores: {found:#?}");
}

#[test]
fn each_engine_is_named_in_one_module() {
    let homes = [
        ("use fjall", "src/storage"),
        ("fjall::Database", "src/storage"),
        ("::eraftpb", "src/raft"),
        ("RawNode", "src/raft"),
    ];
    for (word, home) in homes {
        let found: Vec<String> = sources("src")
            .into_iter()
            .filter(|(path, _)| !path.starts_with(home))
            .filter(|(_, text)| code(text).replace("storage::fjall::", "").contains(word))
            .map(|(path, _)| path.display().to_string())
            .collect();
        assert!(found.is_empty(), "{word} outside {home}: {found:#?}");
    }
}

#[test]
fn modules_keep_to_their_edges() {
    let rules: &[(&str, &[&str])] = &[
        ("src/mvcc", &["crate::raft", "crate::apply", "crate::api", "crate::http", "crate::watch", "tonic", "tokio"]),
        ("src/storage", &["crate::raft", "crate::apply", "crate::api", "crate::mvcc", "tonic", "tokio"]),
        ("src/lease", &["crate::raft", "crate::api", "tonic"]),
        ("src/cluster", &["crate::raft::", "crate::api", "tonic", "tokio"]),
        ("src/apply", &["crate::api", "crate::http", "tonic", "raft::eraftpb"]),
        ("src/actor", &["crate::raft", "crate::apply", "crate::mvcc", "crate::api"]),
    ];
    let mut found = Vec::new();
    for (dir, words) in rules {
        found.extend(offences(&[dir], words, &[]));
    }
    assert!(found.is_empty(), "edges crossed: {found:#?}");
}

#[test]
fn no_stray_marks_and_no_unwrap_outside_tests() {
    let marks = ["TO".to_owned() + "DO", "FIX".to_owned() + "ME", "XX".to_owned() + "X", "todo".to_owned() + "!("];
    for dir in ["src", "tests", "benches"] {
        for (path, text) in sources(dir) {
            for mark in &marks {
                assert!(!text.contains(mark.as_str()), "{} holds {mark}", path.display());
            }
            if dir == "src" && !is_test(&path) {
                assert!(!code(&text).contains(".unwrap()"), "{} unwraps outside tests", path.display());
            }
        }
    }
}

#[test]
fn long_files_say_why() {
    for dir in ["src", "tests", "benches"] {
        for (path, text) in sources(dir) {
            let lines = text.lines().count();
            let head: String = text.lines().take_while(|l| l.starts_with("//!")).collect();
            assert!(
                lines <= 1000 || head.contains("long"),
                "{} has {lines} lines and no reason in its head",
                path.display()
            );
        }
    }
}

#[test]
fn the_top_level_holds_what_belongs_there() {
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "src",
        "proto",
        "config",
        "tests",
        "benches",
        "dashboards",
        "README.md",
        "build.rs",
        "LICENSE",
        "CHANGELOG.md",
        "clippy.toml",
        "rustfmt.toml",
        "target",
        "default.etcd",
    ];
    for entry in fs::read_dir(env!("CARGO_MANIFEST_DIR")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name.starts_with('.') || allowed.contains(&name.as_str()), "{name} does not belong at the top level");
    }
}

#[test]
fn every_module_says_what_it_is() {
    for (path, text) in sources("src") {
        assert!(
            is_test(&path) || text.starts_with("//!") || text.starts_with("#![doc"),
            "{} has no head",
            path.display()
        );
    }
}
