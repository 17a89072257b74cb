//! The Cluster service. Membership is kept and listed; changes of it are not there yet.

use tonic::{Request, Response, Status};

use super::{Handle, status::not_implemented};
use crate::pb::etcdserverpb::{
    MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest,
    MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
    cluster_server::Cluster,
};

const CHANGES: &str = "changes of the cluster's membership";

#[tonic::async_trait]
impl Cluster for Handle {
    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        let view = match request.into_inner().linearizable {
            true => self.server.linearizable_view(self.runtime).await?,
            false => self.server.view.load_full(),
        };
        // The one header without a revision (G-6).
        let header = Some(self.server.header(0, view.applied_term));
        Ok(Response::new(MemberListResponse { header, members: view.members.list() }))
    }

    async fn member_add(&self, _: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
        Err(not_implemented(CHANGES))
    }

    async fn member_remove(&self, _: Request<MemberRemoveRequest>) -> Result<Response<MemberRemoveResponse>, Status> {
        Err(not_implemented(CHANGES))
    }

    async fn member_update(&self, _: Request<MemberUpdateRequest>) -> Result<Response<MemberUpdateResponse>, Status> {
        Err(not_implemented(CHANGES))
    }

    async fn member_promote(
        &self,
        _: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        Err(not_implemented(CHANGES))
    }
}
