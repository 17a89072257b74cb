//! The self-check: members compare the hashes of their histories. The leader does so every `--corrupt-check-time` and raises
//! CORRUPT for whoever differs; a restarted member does so before it serves, where the gate InitialCorruptCheck is open.

use std::{sync::Arc, time::Duration};

use anyhow::bail;

use crate::{
    api::Server,
    cluster::{Member, ids::hex},
    mvcc::hash,
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
    let before = own(server, 0).await?;
    let mut others = Vec::new();
    let members = server.view.load().members.clone();
    for member in members.iter().filter(|member| member.id != server.settings.member_id) {
        match ask(server, member, before.revision).await {
            Some(hashed) => others.push((member.id, hashed)),
            None => tracing::info!(member = hex(member.id), "no hash to compare with"),
        }
    }
    server.linearizable_view(runtime).await?;
    let after = own(server, 0).await?;
    if let Some(member_id) = judge(server.settings.member_id, before, after, &others) {
        let kind = AlarmType::Corrupt as i32;
        tracing::error!(member = hex(member_id), "data differs between members; raising the CORRUPT alarm");
        let alarm = AlarmRequest { action: AlarmAction::Activate as i32, member_id, alarm: kind };
        let request = InternalRaftRequest { alarm: Some(alarm), ..Default::default() };
        server.propose(request, runtime).await?;
    }
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
    let here = own(server, 0).await?;
    let members = server.view.load().members.clone();
    for member in members.iter().filter(|member| member.id != own_id) {
        // One that does not answer, or is behind, or has compacted further, tells nothing.
        let Some(there) = ask(server, member, here.revision).await else { continue };
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

async fn own(server: &Arc<Server>, revision: i64) -> anyhow::Result<Hashed> {
    let server = server.clone();
    let scan = move || {
        let view = server.view.load_full();
        server.read(view, |view| hash::hash_kv(&view.kv, &*server.storage, revision))
    };
    let (view, found) = tokio::task::spawn_blocking(scan).await??;
    Ok(Hashed { revision: view.kv.revision, compact_revision: found.compact_revision, hash: found.hash })
}

async fn ask(server: &Server, member: &Member, revision: i64) -> Option<Hashed> {
    for url in &member.peer_urls {
        match client::hash_kv(url, server.settings.cluster_id, revision, ASK).await {
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
}
