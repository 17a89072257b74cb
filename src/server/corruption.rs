//! The self-check: members compare the hashes of their histories. The leader does so every `--corrupt-check-time`, and for
//! the hashes that compactions left with the gate CompactHashCheck, and raises CORRUPT for whoever differs; a restarted
//! member does so before it serves, where the gate InitialCorruptCheck is open.

use std::{collections::BTreeMap, sync::Arc, thread, time::Duration};

use anyhow::bail;

use crate::{
    api::Server,
    apply::{ApplySender, Control},
    cluster::{Member, ids::hex},
    mvcc::hash::{self, CompactionJob, HashKv},
    pb::etcdserverpb::{AlarmRequest, AlarmType, InternalRaftRequest, alarm_request::AlarmAction},
    peer::client,
};

/// How long one member may take to hash all its rows.
const ASK: Duration = Duration::from_secs(30);

/// What a member says of its history up to `hash_revision`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hashed {
    /// The newest revision it knows.
    revision: i64,
    compact_revision: i64,
    hash: u32,
}

/// Looks every so often, as long as this member leads.
pub async fn watch(server: Arc<Server>, every: Duration, runtime: usize) {
    let mut ticks = super::ticks(every);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        if server.raft_status.read().is_leader
            && let Err(e) = look(&server, runtime).await
        {
            tracing::warn!("the members' data could not be compared: {e:#}");
        }
    }
}

/// One look, as leader: at most one alarm.
async fn look(server: &Arc<Server>, runtime: usize) -> anyhow::Result<()> {
    let before = own(server).await?;
    let mut others = Vec::new();
    let members = server.view.load().members.clone();
    for member in members.iter().filter(|member| member.id != server.settings.member_id) {
        match ask(server, member, before.revision, ASK).await {
            Some(hashed) => others.push((member.id, hashed)),
            None => tracing::info!(member = hex(member.id), "no hash to compare with"),
        }
    }
    server.linearizable_view(runtime).await?;
    let after = own(server).await?;
    if let Some(member_id) = judge(server.settings.member_id, before, after, &others) {
        raise(server, member_id, runtime).await?;
    }
    Ok(())
}

/// For member 0: for nobody in particular.
async fn raise(server: &Server, member_id: u64, runtime: usize) -> anyhow::Result<()> {
    tracing::error!(member = hex(member_id), "data differs between members; raising the CORRUPT alarm");
    let kind = AlarmType::Corrupt as i32;
    let alarm = AlarmRequest { action: AlarmAction::Activate as i32, member_id, alarm: kind };
    server.propose(InternalRaftRequest { alarm: Some(alarm), ..Default::default() }, runtime).await?;
    Ok(())
}

/// Who is corrupt, as far as the leader can tell.
fn judge(own_id: u64, before: Hashed, after: Hashed, others: &[(u64, Hashed)]) -> Option<u64> {
    let same_place = before.revision == after.revision && before.compact_revision == after.compact_revision;
    if same_place && before.hash != after.hash {
        return Some(own_id);
    }
    let is_corrupt = |other: &Hashed| {
        // Nobody can know more than the leader does after its read round.
        other.revision > after.revision
            || other.compact_revision > after.compact_revision
            || other.compact_revision == before.compact_revision && other.hash != before.hash
    };
    others.iter().find(|(_, other)| is_corrupt(other)).map(|(id, _)| *id)
}

/// Before serving: refuses to go on with other data than the others have at the same revision.
pub async fn check_at_start(server: &Arc<Server>) -> anyhow::Result<()> {
    let own_id = server.settings.member_id;
    let here = own(server).await?;
    let members = server.view.load().members.clone();
    for member in members.iter().filter(|member| member.id != own_id) {
        // One that does not answer, or is behind, or has compacted further, tells nothing.
        let Some(there) = ask(server, member, here.revision, ASK).await else { continue };
        if there.compact_revision == here.compact_revision && there.hash != here.hash {
            bail!(
                "{} found data inconsistency with peers: {} has other data at revision {}",
                hex(own_id),
                hex(member.id),
                here.revision
            );
        }
    }
    Ok(())
}

/// Computes hashes of compactions, each on a thread of its own. Apply asks for one at a time.
pub fn hasher(apply: ApplySender) -> Box<dyn Fn(CompactionJob) + Send> {
    /// Tells apply in any case: it keeps callers waiting.
    struct Report(ApplySender, Option<HashKv>);
    impl Drop for Report {
        fn drop(&mut self) {
            self.0.control(Control::Hashed(self.1));
        }
    }
    Box::new(move |job| {
        let report = Report(apply.clone(), None);
        let run = move || {
            let mut report = report;
            match job.run() {
                Ok(hash) => report.1 = Some(hash),
                Err(e) => tracing::warn!("a compaction is left without a hash: {e}"),
            }
        };
        if let Err(e) = thread::Builder::new().name("compaction-hash".to_owned()).spawn(run) {
            tracing::warn!("no thread for the hash of a compaction: {e}");
        }
    })
}

/// Looks every so often at what compactions left, as long as this member leads.
pub async fn watch_compactions(server: Arc<Server>, every: Duration, runtime: usize) {
    let mut checked = i64::MIN;
    loop {
        tokio::time::sleep(every).await;
        if server.raft_status.read().is_leader
            && let Err(e) = look_at_compactions(&server, &mut checked, runtime).await
        {
            tracing::warn!("no alarm could be raised: {e:#}");
        }
    }
}

/// One look, as leader, at the compactions after `checked`, from the newest to the first that all can tell of.
async fn look_at_compactions(server: &Arc<Server>, checked: &mut i64, runtime: usize) -> anyhow::Result<()> {
    let own_id = server.settings.member_id;
    let hashes = server.view.load().kv.hashes.clone();
    let mut looked_at = 0;
    for own in hashes.newest_first().take_while(|own| own.hash_revision > *checked) {
        looked_at += 1;
        let mut others = Vec::new();
        let members = server.view.load().members.clone();
        for member in members.iter().filter(|member| member.id != own_id) {
            let hashed = ask(server, member, own.hash_revision, server.settings.request_timeout).await;
            let hash =
                hashed.filter(|hashed| hashed.compact_revision == own.compact_revision).map(|hashed| hashed.hash);
            if hash.is_none() {
                tracing::info!(member = hex(member.id), revision = own.hash_revision, "no hash to compare with");
            }
            others.push((member.id, hash));
        }
        match judge_compaction((own_id, own.hash), &others) {
            Verdict::Equal => {
                *checked = own.hash_revision;
                break;
            }
            Verdict::Open => {}
            Verdict::Corrupt(members) => {
                for member_id in members {
                    raise(server, member_id, runtime).await?;
                }
                break;
            }
        }
    }
    tracing::info!(hashes = looked_at, "finished compaction hash check");
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Equal,
    /// Somebody could not tell, or nobody was asked: an older compaction may say more.
    Open,
    /// These members differ from a majority; 0: somebody is wrong, but nobody knows who.
    Corrupt(Vec<u64>),
}

/// `others` are all other members, each with its hash of the same compaction if it has one.
fn judge_compaction(own: (u64, u32), others: &[(u64, Option<u32>)]) -> Verdict {
    let mut by_hash = BTreeMap::from([(own.1, vec![own.0])]);
    for (id, hash) in others.iter().filter_map(|(id, hash)| Some((*id, (*hash)?))) {
        by_hash.entry(hash).or_default().push(id);
    }
    if by_hash.len() == 1 {
        let all_told = !others.is_empty() && others.iter().all(|(_, hash)| hash.is_some());
        return if all_told { Verdict::Equal } else { Verdict::Open };
    }
    let members = others.len() + 1;
    let quorum = members / 2 + 1;
    if by_hash.values().any(|members| members.len() >= quorum) {
        Verdict::Corrupt(by_hash.into_values().filter(|members| members.len() < quorum).flatten().collect())
    } else {
        Verdict::Corrupt(vec![0])
    }
}

/// Of the data as they are now, whatever compactions left.
async fn own(server: &Arc<Server>) -> anyhow::Result<Hashed> {
    let server = server.clone();
    let scan = move || {
        let view = server.view.load_full();
        server.read(view, |view| hash::scan_kv(&view.kv, &*server.storage, 0))
    };
    let (view, found) = tokio::task::spawn_blocking(scan).await??;
    Ok(Hashed { revision: view.kv.revision, compact_revision: found.compact_revision, hash: found.hash })
}

async fn ask(server: &Server, member: &Member, revision: i64, timeout: Duration) -> Option<Hashed> {
    for url in &member.peer_urls {
        match client::hash_kv(url, server.settings.cluster_id, revision, timeout).await {
            Ok(answer) => {
                let client::HashKv { revision, compact_revision, hash, .. } = answer;
                return Some(Hashed { revision, compact_revision, hash });
            }
            Err(e) => tracing::debug!("no hash: {e}"),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn hashed(revision: i64, compact_revision: i64, hash: u32) -> Hashed {
        Hashed { revision, compact_revision, hash }
    }

    #[test]
    fn whoever_differs_is_named() {
        // limits 12
        let (own, before, after) = (1, hashed(10, 5, 7), hashed(12, 5, 9));
        let judge = |others: &[(u64, Hashed)]| judge(own, before, after, others);
        assert_eq!(judge(&[]), None);
        assert_eq!(
            judge(&[(2, hashed(11, 5, 7)), (3, hashed(9, 4, 8))]),
            None,
            "another compact revision says nothing"
        );
        assert_eq!(judge(&[(2, hashed(10, 5, 7)), (3, hashed(10, 5, 8))]), Some(3));
        assert_eq!(judge(&[(2, hashed(13, 5, 7))]), Some(2), "ahead of the leader");
        assert_eq!(judge(&[(2, hashed(12, 6, 7))]), Some(2), "compacted further than the leader");
    }

    #[test]
    fn a_leader_whose_own_hash_changes_names_itself() {
        let same = hashed(10, 5, 7);
        assert_eq!(judge(1, same, hashed(10, 5, 8), &[(2, same)]), Some(1));
        assert_eq!(judge(1, same, hashed(11, 5, 8), &[(2, same)]), None, "something was written");
    }

    #[test]
    fn the_minority_of_a_compaction_is_named() {
        // limits 12
        use Verdict::{Corrupt, Equal, Open};
        let judge = |others: &[(u64, Option<u32>)]| judge_compaction((1, 7), others);
        assert_eq!(judge(&[]), Open);
        assert_eq!(judge(&[(2, Some(7)), (3, Some(7))]), Equal);
        assert_eq!(judge(&[(2, Some(7)), (3, None)]), Open);
        assert_eq!(judge(&[(2, Some(7)), (3, Some(8))]), Corrupt(vec![3]));
        assert_eq!(judge(&[(2, Some(8)), (3, Some(8))]), Corrupt(vec![1]), "the leader itself");
        assert_eq!(judge(&[(2, Some(8)), (3, Some(7)), (4, Some(9)), (5, Some(7))]), Corrupt(vec![2, 4]));
        assert_eq!(judge(&[(2, Some(8)), (3, None)]), Corrupt(vec![0]), "one of three is no majority");
        assert_eq!(judge(&[(2, Some(8)), (3, Some(9))]), Corrupt(vec![0]));
        assert_eq!(judge(&[(2, Some(8))]), Corrupt(vec![0]));
    }
}
