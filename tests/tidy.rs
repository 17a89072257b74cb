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

/// The code of a file: without comments, and up to its tests.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text);
    let text = text.split("#[cfg(test)]\npub(super) mod tests {").next().unwrap_or(text);
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

#[test]
fn cores_see_no_clock_no_random_numbers_no_files_no_sockets() {
    let cores = ["src/mvcc", "src/apply", "src/watch", "src/raft", "src/lease", "src/cluster", "src/wal"];
    let words = [
        "Instant::now",
        "SystemTime::now",
        "thread_rng",
        "rand::rng",
        "std::fs",
        "std::net",
        "tokio::net",
        "thread::spawn",
    ];
    // Shells: they carry time and tasks to their cores, and measure them.
    let shells = ["watch/shell.rs", "lease/actor.rs", "apply/actor.rs", "wal/disk.rs"];
    let found = offences(&cores, &words, &shells);
    assert!(found.is_empty(), "seams passed by: {found:#?}");
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
    let cores = ["src/mvcc", "src/apply", "src/watch", "src/raft", "src/lease", "src/cluster", "src/wal"];
    let found = offences(&cores, &["HashMap", "HashSet"], &known);
    assert!(found.is_empty(), "hash maps whose order may show: {found:#?}");
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
