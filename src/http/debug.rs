//! `/debug/vars`, what the process tells of itself as JSON, and `/debug/pprof/`, of which there is little: the profiles
//! behind these paths are those of Go's runtime.

use http::{Response, StatusCode};
use http_body_util::Full;
use serde_json::{Map, Value, json};

use super::{Answer, set_type, text_error};
use crate::{api::Server, raft};

/// The paths of profiles; others below `/debug/pprof/` do not exist.
const PROFILES: &[&str] =
    &["", "profile", "symbol", "trace", "allocs", "heap", "goroutine", "threadcreate", "block", "mutex"];

pub async fn vars(server: &Server) -> Answer {
    let (answer, inspected) = tokio::sync::oneshot::channel();
    server.raft.control(raft::Control::Inspect(answer));
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(0);
    let mut vars = vec![
        ("cmdline", json!(std::env::args().collect::<Vec<_>>())),
        ("file_descriptor_limit", json!(descriptors)),
        ("memstats", json!({ "Sys": resident_bytes() })),
    ];
    if let Ok(raft) = inspected.await {
        vars.push(("raft.status", status(&raft, server.view.load().applied_index)));
    }
    // One line for each, as Go writes them.
    let lines: Vec<String> = vars.iter().map(|(name, value)| format!("{}: {value}", json!(name))).collect();
    let mut response = Response::new(Full::from(format!("{{\n{}\n}}\n", lines.join(",\n"))));
    set_type(&mut response, "application/json; charset=utf-8");
    response
}

fn status(raft: &raft::Inspection, applied: u64) -> Value {
    let hex = |id: u64| format!("{id:x}");
    let place = |p: &raft::Progress| (hex(p.id), json!({ "match": p.matched, "next": p.next, "state": p.state }));
    let progress: Map<String, Value> = raft.progress.iter().map(place).collect();
    json!({
        "id": hex(raft.id),
        "term": raft.term,
        "vote": hex(raft.vote),
        "commit": raft.commit,
        "lead": hex(raft.leader),
        "raftState": raft.role,
        "applied": applied,
        "progress": progress,
        "leadtransferee": hex(raft.transferee),
    })
}

/// 0 where `/proc` is not there.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok().and_then(|text| text.split(' ').nth(1)?.parse().ok());
    pages.unwrap_or(0) * 4096
}

/// `path` is what follows `/debug/pprof/`.
pub fn profile(path: &str) -> Answer {
    if path == "cmdline" {
        let mut response = Response::new(Full::from(std::env::args().collect::<Vec<_>>().join("\0")));
        set_type(&mut response, "text/plain; charset=utf-8");
        response
    } else if PROFILES.contains(&path) {
        let text = "not implemented: profiles of Go's runtime, which this program does not have; use perf on Linux";
        text_error(StatusCode::NOT_IMPLEMENTED, text)
    } else {
        text_error(StatusCode::NOT_FOUND, "Unknown profile")
    }
}
