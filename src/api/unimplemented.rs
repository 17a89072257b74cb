//! Services whose capability is not there yet: registered, so that a client gets a clear answer.
//!
//! Authentication is off and cannot be switched on, so the two calls about that state tell it truly.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::{
    Handle,
    status::{auth_not_enabled, not_implemented},
};
use crate::pb::{
    etcdserverpb::{auth_server::Auth, *},
    v3electionpb::{election_server::Election, *},
    v3lockpb::{lock_server::Lock, *},
};

/// An implementation of a service whose methods answer "not implemented: <what>", beside those given whole.
macro_rules! not_yet {
    ($service:ident, $what:literal, { $($whole:item)* }, $($method:ident($request:ty) -> $response:ty;)*) => {
        #[tonic::async_trait]
        impl $service for Handle {
            $($whole)*
            $(
                async fn $method(&self, _: Request<$request>) -> Result<Response<$response>, Status> {
                    Err(not_implemented($what))
                }
            )*
        }
    };
}

not_yet!(Auth, "users, roles and authentication", {
        async fn auth_status(&self, _: Request<AuthStatusRequest>) -> Result<Response<AuthStatusResponse>, Status> {
            let header = Some(self.server.header_of(&self.server.view.load()));
            Ok(Response::new(AuthStatusResponse { header, enabled: false, auth_revision: 1 }))
        }

        async fn authenticate(&self, _: Request<AuthenticateRequest>) -> Result<Response<AuthenticateResponse>, Status> {
            Err(auth_not_enabled())
        }
    },
    auth_enable(AuthEnableRequest) -> AuthEnableResponse;
    auth_disable(AuthDisableRequest) -> AuthDisableResponse;
    user_add(AuthUserAddRequest) -> AuthUserAddResponse;
    user_get(AuthUserGetRequest) -> AuthUserGetResponse;
    user_list(AuthUserListRequest) -> AuthUserListResponse;
    user_delete(AuthUserDeleteRequest) -> AuthUserDeleteResponse;
    user_change_password(AuthUserChangePasswordRequest) -> AuthUserChangePasswordResponse;
    user_grant_role(AuthUserGrantRoleRequest) -> AuthUserGrantRoleResponse;
    user_revoke_role(AuthUserRevokeRoleRequest) -> AuthUserRevokeRoleResponse;
    role_add(AuthRoleAddRequest) -> AuthRoleAddResponse;
    role_get(AuthRoleGetRequest) -> AuthRoleGetResponse;
    role_list(AuthRoleListRequest) -> AuthRoleListResponse;
    role_delete(AuthRoleDeleteRequest) -> AuthRoleDeleteResponse;
    role_grant_permission(AuthRoleGrantPermissionRequest) -> AuthRoleGrantPermissionResponse;
    role_revoke_permission(AuthRoleRevokePermissionRequest) -> AuthRoleRevokePermissionResponse;
);

not_yet!(Lock, "the lock service", {},
    lock(LockRequest) -> LockResponse;
    unlock(UnlockRequest) -> UnlockResponse;
);

not_yet!(Election, "the election service", {
        type ObserveStream = Pin<Box<dyn Stream<Item = Result<LeaderResponse, Status>> + Send>>;

        async fn observe(&self, _: Request<LeaderRequest>) -> Result<Response<Self::ObserveStream>, Status> {
            Err(not_implemented("the election service"))
        }
    },
    campaign(CampaignRequest) -> CampaignResponse;
    proclaim(ProclaimRequest) -> ProclaimResponse;
    leader(LeaderRequest) -> LeaderResponse;
    resign(ResignRequest) -> ResignResponse;
);
