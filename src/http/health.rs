//! `/health`, `/livez` and `/readyz`: may this member be sent traffic?

use std::fmt::Write;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::Full;

use super::{Answer, not_found, query_values, set_type, text_error};
use crate::{api::Handle, pb::etcdserverpb::AlarmType};

/// M-14: alarms, leader, a trial read, in this order.
pub async fn health(handle: &Handle, query: &str) -> Answer {
    let excluded = query_values(query, "exclude");
    let serializable = query_values(query, "serializable").iter().any(|v| v == "true");
    let reason = unhealthy(handle, &excluded, serializable).await;
    let metrics = &handle.server.metrics;
    match reason {
        None => {
            metrics.health_ok.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let mut response = Response::new(Full::new(Bytes::from_static(br#"{"health":"true","reason":""}"#)));
            set_type(&mut response, "text/plain; charset=utf-8");
            response
        }
        Some(reason) => {
            metrics.health_failed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let reason = serde_json::Value::from(reason);
            text_error(StatusCode::SERVICE_UNAVAILABLE, &format!(r#"{{"health":"false","reason":{reason}}}"#))
        }
    }
}

async fn unhealthy(handle: &Handle, excluded: &[String], serializable: bool) -> Option<String> {
    let server = &handle.server;
    for alarm in server.view.load().alarms.list(AlarmType::None as i32) {
        let name = AlarmType::try_from(alarm.alarm).map_or("UNKNOWN", |kind| kind.as_str_name());
        if !excluded.iter().any(|e| e == name) {
            return Some(format!("ALARM {name}"));
        }
    }
    if serializable {
        return None;
    }
    if server.raft_status.read().leader == 0 {
        return Some("RAFT NO LEADER".to_owned());
    }
    match server.linearizable_view(handle.runtime).await {
        Ok(_) => None,
        Err(e) => Some(format!("RANGE ERROR:etcdserver: {e}")),
    }
}

const LIVE: &[&str] = &["serializable_read"];
const READY: &[&str] = &["data_corruption", "serializable_read", "linearizable_read", "non_learner"];

/// Whether `path` is that of a single check.
pub fn is_check(path: &str) -> bool {
    let of = |family, all: &[&str]| path.strip_prefix(family).is_some_and(|check| all.contains(&check));
    of("/livez/", LIVE) || of("/readyz/", READY)
}

/// M-15: `/livez`, `/readyz` and one check of theirs as a sub-path.
pub async fn checks(handle: &Handle, path: &str, query: &str) -> Answer {
    let (all, rest) = match path.strip_prefix("/livez") {
        Some(rest) => (LIVE, rest),
        None => (READY, path.strip_prefix("/readyz").unwrap_or(path)),
    };
    let chosen: Vec<&str> = match rest {
        "" => {
            let excluded = query_values(query, "exclude");
            for name in excluded.iter().filter(|e| !all.contains(&e.as_str())) {
                tracing::warn!(check = name, "a health check that does not exist is excluded");
            }
            all.iter().copied().filter(|check| !excluded.iter().any(|e| e == check)).collect()
        }
        _ => match all.iter().find(|check| rest.strip_prefix('/') == Some(check)) {
            Some(check) => vec![*check],
            None => return not_found(),
        },
    };
    let mut lines = String::new();
    let mut failed = false;
    for check in chosen {
        let ran = run(handle, check).await;
        let family = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        if let Some(counts) = handle.server.metrics.check(family, check) {
            counts.ran(ran.is_ok());
        }
        match ran {
            Ok(()) => {
                let _ = writeln!(lines, "[+]{check} ok");
            }
            Err(e) => {
                failed = true;
                let _ = writeln!(lines, "[-]{check} failed: {e}");
            }
        }
    }
    if failed {
        return text_error(StatusCode::SERVICE_UNAVAILABLE, &lines);
    }
    let verbose = !query_values(query, "verbose").is_empty();
    let mut response = text_error(StatusCode::OK, "ok");
    if verbose {
        *response.body_mut() = Full::from(format!("{lines}ok\n"));
    }
    response
}

async fn run(handle: &Handle, check: &str) -> Result<(), String> {
    let server = &handle.server;
    match check {
        "data_corruption" if server.view.load().alarms.is_active(AlarmType::Corrupt) => {
            Err("alarm activated: CORRUPT".to_owned())
        }
        "linearizable_read" => match server.linearizable_view(handle.runtime).await {
            Ok(_) => Ok(()),
            Err(e) => Err(format!("etcdserver: {e}")),
        },
        "non_learner" if server.raft_status.read().is_learner => Err("not supported for learner".to_owned()),
        // A local read of memory cannot fail.
        _ => Ok(()),
    }
}
