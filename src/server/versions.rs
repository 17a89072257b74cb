//! The cluster version: what all members can do. The leader looks at everybody's version when it begins to lead and then
//! every few seconds, raises the cluster's to the lowest, and ends a downgrade when all have come down.

use std::{sync::Arc, time::Duration};

use crate::{
    api::Server,
    apply,
    cluster::{Version, bootstrap},
    config::ETCD_VERSION,
    pb::{etcdserverpb::InternalRaftRequest, membershippb::DowngradeInfoSetRequest},
    peer::client,
};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(4);
/// How long one member is asked.
const ASK: Duration = Duration::from_secs(1);
/// Before the versions of all members are known.
const UNKNOWN: Version = Version::new(3, 0, 0);

/// Follows this member's leadership as long as it runs.
pub async fn watch(server: Arc<Server>, runtime: usize) {
    loop {
        let led = server.raft_status.until(|now| now.is_leader).await;
        server.view.until(|view| view.applied_term >= led.term).await;
        if let Err(e) = look(&server, runtime).await {
            tracing::warn!("the cluster version could not be looked after: {e}");
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// One look, as leader.
pub async fn look(server: &Server, runtime: usize) -> Result<(), apply::Error> {
    let lowest = lowest_version(server).await;
    let view = server.view.load_full();
    let (current, job) = (view.members.cluster_version(), view.members.downgrade().clone());
    let target: Option<Version> = if job.enabled { job.target_version.parse().ok() } else { None };
    if let Some(version) = decide(current, lowest, target) {
        tracing::info!(from = ?current.map(|v| v.to_string()), to = %version, "setting the cluster version");
        server.propose(bootstrap::cluster_version_request(version), runtime).await?;
    }
    if target.is_some() && target == lowest {
        tracing::info!(version = %job.target_version, "the downgrade is done");
        let done = DowngradeInfoSetRequest { enabled: false, ver: String::new() };
        let request = InternalRaftRequest { downgrade_info_set: Some(done), ..Default::default() };
        server.propose(request, runtime).await?;
    }
    Ok(())
}

/// The lowest of all members' versions, to the minor; `None` if one does not answer.
async fn lowest_version(server: &Server) -> Option<Version> {
    let mut lowest: Version = ETCD_VERSION.parse().expect("the own version is one");
    let members = server.view.load().members.clone();
    for member in members.iter().filter(|member| member.id != server.settings.member_id) {
        let mut answer = None;
        for url in &member.peer_urls {
            if answer.is_none() {
                answer = client::versions(url, ASK).await.ok().and_then(|versions| versions.server.parse().ok());
            }
        }
        lowest = lowest.min(answer?);
    }
    Some(lowest.cluster_version())
}

/// The version to set now, if any. `downgrade`: the target of a job that is on.
fn decide(current: Option<Version>, lowest: Option<Version>, downgrade: Option<Version>) -> Option<Version> {
    match (current, lowest, downgrade) {
        (None, lowest, _) => Some(lowest.unwrap_or(UNKNOWN)),
        (Some(current), Some(lowest), Some(target)) => {
            (target.is_one_minor_below(current) && target.is_one_minor_below(lowest)).then_some(target)
        }
        (Some(current), Some(lowest), None) => (lowest > current).then_some(lowest),
        (Some(_), None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_the_lowest_and_only_goes_up() {
        // C-32, limits 16
        let v = |minor| Version::new(3, minor, 0);
        assert_eq!(decide(None, Some(v(7)), None), Some(v(7)));
        assert_eq!(decide(None, None, None), Some(v(0)), "somebody does not answer");
        assert_eq!(decide(Some(v(0)), Some(v(7)), None), Some(v(7)), "any number of minors at once");
        assert_eq!(decide(Some(v(7)), Some(v(7)), None), None);
        assert_eq!(decide(Some(v(7)), Some(v(6)), None), None);
        assert_eq!(decide(Some(v(7)), None, None), None);
    }

    #[test]
    fn downgrade_lowers_the_version_before_the_members() {
        // C-42
        let v = |minor| Version::new(3, minor, 0);
        assert_eq!(decide(Some(v(7)), Some(v(7)), Some(v(6))), Some(v(6)));
        assert_eq!(decide(Some(v(6)), Some(v(7)), Some(v(6))), None, "done already");
        assert_eq!(decide(Some(v(6)), Some(v(6)), Some(v(6))), None, "and it does not go up again meanwhile");
        assert_eq!(decide(Some(v(7)), None, Some(v(6))), None);
    }
}
