//! The cluster version: what all members can do. The leader looks at everybody's version when it begins to lead and then
//! every few seconds and raises the cluster's to the lowest. At times of its own it ends a downgrade when all have come down.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;

use crate::{
    api::Server,
    apply,
    cluster::{Version, bootstrap, v2_request},
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
        match look(&server, led.term, runtime).await {
            // Whoever leads now looks for itself.
            Ok(()) | Err(apply::Error::NotLeader) => {}
            Err(e) => tracing::warn!("the cluster version could not be looked after: {e}"),
        }
        let over = server.raft_status.until(|now| now.term != led.term || !now.is_leader);
        let _ = tokio::time::timeout(EVERY, over).await;
    }
}

/// One look, as leader of `term`: what it finds out is good for no other (H-40).
pub async fn look(server: &Server, term: u64, runtime: usize) -> Result<(), apply::Error> {
    let versions = versions(server).await;
    let view = server.view.load_full();
    let current = view.members.cluster_version();
    if let Some(version) = decide(current, lowest(&versions), target(&view)) {
        tracing::info!(from = ?current.map(|v| v.to_string()), to = %version, "setting the cluster version");
        let request = bootstrap::cluster_version_request(version);
        server.propose_for(request, oldest_of(&versions, current), Some(term), runtime).await?;
    }
    Ok(())
}

/// The release a downgrade under way goes to.
fn target(view: &apply::View) -> Option<Version> {
    let job = view.members.downgrade();
    if job.enabled { job.target_version.parse().ok() } else { None }
}

/// Looks every so often, while this member leads, whether a downgrade has come to its end.
pub async fn watch_downgrade(server: Arc<Server>, every: Duration, runtime: usize) {
    let mut ticks = super::ticks(every);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let raft = server.raft_status.read();
        if !raft.is_leader {
            continue;
        }
        match end_downgrade(&server, raft.term, runtime).await {
            Ok(()) | Err(apply::Error::NotLeader) => {}
            Err(e) => tracing::warn!("the downgrade could not be ended: {e}"),
        }
    }
}

async fn end_downgrade(server: &Server, term: u64, runtime: usize) -> Result<(), apply::Error> {
    let Some(target) = target(&server.view.load_full()) else { return Ok(()) };
    if have_come_down(&versions(server).await, target) {
        tracing::info!(version = %target, "the downgrade is done");
        let done = DowngradeInfoSetRequest { enabled: false, ver: String::new() };
        let request = InternalRaftRequest { downgrade_info_set: Some(done), ..Default::default() };
        server.propose_as(request, Some(term), runtime).await?;
    }
    Ok(())
}

/// Each member's version to the minor, this one's first; `None` for one that does not answer.
async fn versions(server: &Server) -> Vec<Option<Version>> {
    let own: Version = ETCD_VERSION.parse().expect("the own version is one");
    let members = server.view.load().members.clone();
    let others = members.iter().filter(|member| member.id != server.settings.member_id);
    let mut versions = join_all(others.map(|member| ask(&member.peer_urls))).await;
    versions.insert(0, Some(own.cluster_version()));
    versions
}

/// The version of the first of a member's URLs that answers.
async fn ask(urls: &[String]) -> Option<Version> {
    for url in urls {
        if let Ok(versions) = client::versions(url, ASK).await {
            return versions.server.parse().ok().map(Version::cluster_version);
        }
    }
    None
}

/// The lowest of all; `None` if one is not known.
fn lowest(versions: &[Option<Version>]) -> Option<Version> {
    versions.iter().copied().min().flatten()
}

/// The oldest release among the members, as far as they tell it; who does not counts as the decided version. In a cluster
/// that has decided for one where it makes no difference, nobody is asked.
pub async fn oldest(server: &Server) -> Version {
    match server.view.load().members.cluster_version() {
        Some(decided) if decided >= v2_request::TODAY => decided,
        decided => oldest_of(&versions(server).await, decided),
    }
}

fn oldest_of(versions: &[Option<Version>], decided: Option<Version>) -> Version {
    let decided = decided.filter(|version| *version > UNKNOWN);
    let known = versions.iter().filter_map(|version| version.or(decided));
    known.min().expect("the own version is known")
}

/// All members run the release a downgrade goes to (C-42).
fn have_come_down(versions: &[Option<Version>], target: Version) -> bool {
    versions.iter().all(|version| *version == Some(target.cluster_version()))
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
pub(super) mod tests {
    use super::*;
    use crate::{
        actor::{Gate, Inbox, Registry},
        api,
        apply::{Core, ViewCell},
        raft::{Input, Proposal, RaftInbox},
        storage::{FjallStorage, StoreInUse, fjall::Options},
        telemetry::Metrics,
    };

    /// A server without members whose raft only collects what it is given.
    pub fn alone(dir: &std::path::Path) -> (Server, RaftInbox) {
        let storage = Arc::new(StoreInUse::new(FjallStorage::create(dir, &Options::default()).unwrap()));
        let settings = apply::Settings {
            member_id: 1,
            release: Version::new(3, 7, 1),
            min_lease_ttl: 2,
            max_learners: 1,
            persist_lease_checkpoints: false,
            quota_bytes: None,
        };
        let core = Core::open(storage.clone(), settings).unwrap();
        let (raft, inbox) = Inbox::new("raft", 10, 1 << 20);
        let server = Server::new(api::Parts {
            settings: api::Settings {
                cluster_id: 1,
                member_id: 1,
                max_request_bytes: 1 << 20,
                max_txn_ops: 1,
                quota_bytes: None,
                quota_configured: 0,
                request_timeout: Duration::from_secs(5),
                min_lease_ttl: 2,
                strict_reconfig_check: true,
                election_timeout: Duration::from_secs(1),
                slow_request: Duration::from_secs(1),
                features: Vec::new(),
                fast_lease_keep_alive: true,
                profiles: false,
            },
            view: ViewCell::new(core.view()),
            storage,
            raft,
            raft_status: Arc::default(),
            apply: Inbox::new("apply", 1, 1).0,
            leases: Inbox::new("leases", 1, 1).0,
            gate: Gate::new("proposals", 10, 1 << 20),
            reads: Gate::new("reads", 10, 10),
            answer_pieces: Gate::new("answer_pieces", 10, 10),
            answers_whole: Gate::new("answers_whole", 10, 10),
            registry: Registry::default(),
            metrics: Metrics::default(),
            started_unix_ms: 1,
        });
        (server, inbox)
    }

    #[tokio::test]
    async fn version_is_proposed_for_one_term_of_leadership() {
        // H-40
        let dir = tempfile::tempdir().unwrap();
        let (server, inbox) = alone(dir.path());
        let raft = async {
            loop {
                if let Some(Input::Propose(Proposal { as_leader_of, ticket, .. })) = inbox.try_recv() {
                    return (as_leader_of, ticket);
                }
                tokio::task::yield_now().await;
            }
        };
        let look = look(&server, 7, 0);
        tokio::pin!(look);
        let (as_leader_of, ticket) = tokio::select! {
            taken = raft => taken,
            done = &mut look => panic!("nothing was proposed: {done:?}"),
        };
        assert_eq!(as_leader_of, Some(7));
        assert_eq!(ticket.request.cluster_version_set.unwrap().ver, "3.7.0");
    }

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
    fn lowest_version_needs_everybody_s_answer() {
        let v = |minor| Some(Version::new(3, minor, 0));
        assert_eq!(lowest(&[v(7), v(5), v(6)]), v(5));
        assert_eq!(lowest(&[v(7), None, v(6)]), None);
    }

    #[test]
    fn oldest_release_is_what_members_tell() {
        let v = |minor| Version::new(3, minor, 0);
        let told = |minors: &[u64]| minors.iter().map(|minor| Some(v(*minor))).collect::<Vec<_>>();
        assert_eq!(oldest_of(&told(&[7, 4, 5]), None), v(4));
        assert_eq!(oldest_of(&told(&[7, 7]), Some(v(4))), v(7), "all have been replaced, and the leader looks soon");
        let silent = [Some(v(7)), None];
        assert_eq!(oldest_of(&silent, Some(v(4))), v(4));
        assert_eq!(oldest_of(&silent, Some(UNKNOWN)), v(7), "an undecided version tells nothing");
        assert_eq!(oldest_of(&silent, None), v(7));
    }

    #[test]
    fn downgrade_ends_only_when_the_highest_has_come_down() {
        // C-42
        let v = |minor| Some(Version::new(3, minor, 0));
        let target = Version::new(3, 6, 0);
        assert!(have_come_down(&[v(6), v(6)], target));
        assert!(!have_come_down(&[v(7), v(6)], target), "one still runs the higher release");
        assert!(!have_come_down(&[v(6), None], target), "one does not say");
        assert!(!have_come_down(&[v(6), v(5)], target), "one is somewhere else");
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
