//! The Cluster service, and the membership changes behind it.
//!
//! The asked member checks what depends on what it sees (`--strict-reconfig-check`); apply checks, on every member alike,
//! what depends on the members alone.

use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use prost::Message;
use tonic::{Request, Response, Status};

use super::{Handle, Server, kv::OTHER_KIND, status};
use crate::{
    apply::{self, Error},
    cluster::{
        Change, Member, Members, Refusal, ids,
        reconfig::{Unsafe, Voters},
    },
    config::Url,
    pb::etcdserverpb::{
        MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest,
        MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
        ResponseHeader, cluster_server::Cluster,
    },
    peer::client,
    raft,
};

/// How long a connection counts as healthy only after it came up.
const HEALTH: Duration = Duration::from_secs(5);
/// A learner may be promoted when it has this much of the leader's log, in tenths.
const IN_SYNC_TENTHS: u128 = 9;
/// Between two tries to reach the leader.
const RETRY: Duration = Duration::from_millis(50);

impl Server {
    /// Puts a membership change into the log; the members when it is in force here (C-28). Whether the members allow it is
    /// for apply to say: this one may have missed what has changed.
    pub async fn change_members(&self, change: Change, runtime: usize) -> Result<Members, Error> {
        let id = self.next_id();
        let data = Bytes::from(change.encode(id).encode_to_vec());
        match self.propose_entry(id, data, Box::default(), true, None, runtime).await? {
            apply::Response::Members(members) => Ok(members),
            other => unreachable!("{OTHER_KIND}: {other:?}"),
        }
    }

    fn check_strictly(&self, check: impl FnOnce(&Voters) -> Result<(), Unsafe>) -> Result<(), Error> {
        if !self.settings.strict_reconfig_check {
            return Ok(());
        }
        let view = self.view.load();
        let is_connected = |id| self.connected_since(id).is_some();
        let is_healthy = |id| self.connected_since(id).is_some_and(|since| since.elapsed() >= HEALTH);
        let voters = Voters {
            members: &view.members,
            own_id: self.settings.member_id,
            is_healthy: &is_healthy,
            is_connected: &is_connected,
        };
        check(&voters).map_err(|e| match e {
            Unsafe::NotEnoughStarted => Error::NotEnoughStarted,
            Unsafe::Unhealthy => Error::Unhealthy,
        })
    }

    /// Promotes a learner, as the leader.
    pub async fn promote_member(&self, id: u64, runtime: usize) -> Result<Members, Error> {
        let promoted = self.promote_as_leader(id, runtime).await;
        match &promoted {
            Ok(_) => _ = self.metrics.promotions.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            Err(Error::NotLeader) => {}
            // With etcd's texts, which name the part that refuses.
            Err(Error::Member(Refusal::NotFound)) => self.metrics.promotion_refused("membership: ID not found"),
            Err(Error::Member(Refusal::NotLearner)) => {
                self.metrics.promotion_refused("membership: can only promote a learner member");
            }
            Err(e) => self.metrics.promotion_refused(&format!("etcdserver: {e}")),
        }
        promoted
    }

    async fn promote_as_leader(&self, id: u64, runtime: usize) -> Result<Members, Error> {
        let (answer, inspected) = tokio::sync::oneshot::channel();
        self.raft.control(raft::Control::Inspect(answer));
        let progress = inspected.await.map_err(|_| Error::Stopped)?.progress;
        let matched = |id| progress.iter().find(|p| p.id == id).map(|p| u128::from(p.matched));
        let Some(own) = matched(self.settings.member_id) else { return Err(Error::NotLeader) };
        let learner = matched(id).ok_or(Error::Member(Refusal::NotFound))?;
        if learner * 10 < own * IN_SYNC_TENTHS {
            return Err(Error::LearnerNotReady);
        }
        self.check_strictly(|voters| voters.may_promote())?;
        self.change_members(Change::Promote(id), runtime).await
    }

    /// Has the leader promote a learner, wherever it is (C-22).
    pub async fn promote_anywhere(&self, id: u64, token: Option<&str>, runtime: usize) -> Result<Vec<Member>, Error> {
        let deadline = Instant::now() + self.settings.request_timeout;
        loop {
            match self.promote_member(id, runtime).await {
                Err(Error::NotLeader) => {}
                done => return done.map(|members| members.iter().cloned().collect()),
            }
            for url in self.leader_urls() {
                let left = deadline.saturating_duration_since(Instant::now());
                match client::promote(&url, id, token, left).await {
                    Ok(members) => return Ok(members),
                    Err(client::Error::Refused { status: 404, .. }) => return Err(Error::Member(Refusal::NotFound)),
                    Err(client::Error::Refused { status: 412, text, .. }) if text.contains("in sync") => {
                        return Err(Error::LearnerNotReady);
                    }
                    Err(client::Error::Refused { status: 412, .. }) => return Err(Error::Member(Refusal::NotLearner)),
                    Err(e) => tracing::warn!("cannot forward a promotion to the leader: {e}"),
                }
            }
            if Instant::now() + RETRY >= deadline {
                return Err(if self.raft_status.read().leader == 0 { Error::NoLeader } else { Error::Timeout });
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Where the present leader listens for members; empty if none is known.
    pub fn leader_urls(&self) -> Vec<String> {
        let leader = self.raft_status.read().leader;
        self.view.load().members.get(leader).map(|member| member.peer_urls.clone()).unwrap_or_default()
    }

    /// The one header without a revision (C-4).
    fn member_header(&self) -> Option<ResponseHeader> {
        Some(self.header(0, self.raft_status.read().term))
    }
}

/// Unix seconds: what makes the id of an added member new.
#[allow(clippy::disallowed_methods)] // the id is part of the request, not of applying it
fn unix_secs() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// C-7: a list of URLs with host and port and nothing behind; sorted.
fn peer_urls(texts: &[String]) -> Option<Vec<String>> {
    let parse = |text: &String| Url::parse(text).ok().map(|url| url.to_string());
    let mut urls = texts.iter().map(parse).collect::<Option<Vec<_>>>()?;
    urls.sort_unstable();
    (!urls.is_empty()).then_some(urls)
}

#[tonic::async_trait]
impl Cluster for Handle {
    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        let view = match request.into_inner().linearizable {
            true => self.server.linearizable_view(self.runtime).await?,
            false => self.server.view.load_full(),
        };
        // The one header without a revision (G-6).
        let header = self.server.member_header();
        Ok(Response::new(MemberListResponse { header, members: view.members.list() }))
    }

    async fn member_add(&self, request: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
        let req = request.into_inner();
        let peer_urls = peer_urls(&req.peer_ur_ls).ok_or_else(status::bad_member_urls)?;
        let server = &self.server;
        server.check_strictly(|voters| voters.may_add(req.is_learner))?;
        let id = ids::member_id_for_add(&peer_urls, unix_secs());
        let member = Member { id, peer_urls, is_learner: req.is_learner, ..Member::default() };
        let added = (&member).into();
        let members = server.change_members(Change::Add(member), self.runtime).await?;
        let header = server.member_header();
        Ok(Response::new(MemberAddResponse { header, member: Some(added), members: members.list() }))
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        let id = request.into_inner().id;
        let server = &self.server;
        server.check_strictly(|voters| voters.may_remove(id))?;
        let members = server.change_members(Change::Remove(id), self.runtime).await?;
        Ok(Response::new(MemberRemoveResponse { header: server.member_header(), members: members.list() }))
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        let MemberUpdateRequest { id, peer_ur_ls: peer_urls } = request.into_inner();
        let server = &self.server;
        let members = server.change_members(Change::Update { id, peer_urls }, self.runtime).await?;
        Ok(Response::new(MemberUpdateResponse { header: server.member_header(), members: members.list() }))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        // The leader judges whether the caller may.
        let token = ["token", "authorization"].into_iter().find_map(|name| request.metadata().get(name));
        let token = token.and_then(|token| token.to_str().ok()).map(str::to_owned);
        let id = request.into_inner().id;
        let members = self.server.promote_anywhere(id, token.as_deref(), self.runtime).await?;
        let members = members.iter().map(Into::into).collect();
        Ok(Response::new(MemberPromoteResponse { header: self.server.member_header(), members }))
    }
}
