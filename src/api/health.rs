//! The standard gRPC health service (`grpc.health.v1`).

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::Handle;
use crate::pb::health::{
    HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
    health_check_response::ServingStatus, health_server::Health,
};

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status as i32 }
}

#[tonic::async_trait]
impl Health for Handle {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        match request.into_inner().service.as_str() {
            "" => Ok(Response::new(response(ServingStatus::Serving))),
            _ => Err(Status::not_found("unknown service")),
        }
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        let statuses = [(String::new(), response(ServingStatus::Serving))].into();
        Ok(Response::new(HealthListResponse { statuses }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let status = match request.into_inner().service.as_str() {
            "" => ServingStatus::Serving,
            _ => ServingStatus::ServiceUnknown,
        };
        // The status never changes while the server runs: one message, then the stream stays open.
        let first = futures_util::stream::once(async move { Ok(response(status)) });
        Ok(Response::new(Box::pin(futures_util::StreamExt::chain(first, futures_util::stream::pending()))))
    }
}
