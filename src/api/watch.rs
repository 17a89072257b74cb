//! The Watch service: carries requests to the hub of this runtime and its responses back.

use std::{pin::Pin, sync::atomic::Ordering};

use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{Handle, status};
use crate::pb::etcdserverpb::{WatchRequest, WatchResponse, watch_server::Watch};

#[tonic::async_trait]
impl Watch for Handle {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<Streaming<WatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let Some((to_hub, responses)) = self.watch.open().await else {
            return Err(crate::apply::Error::Stopped.into());
        };
        let max_request_bytes = self.server.settings.max_request_bytes;
        let mut requests = request.into_inner();
        let broken = self.server.metrics.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    message = requests.message() => match message {
                        Ok(Some(request)) => {
                            tokio::select! {
                                sent = to_hub.send(request, None) => if !sent { return },
                                () = to_hub.closed() => return,
                            }
                        }
                        // Half-closed: events go on (W-11), until the client goes.
                        Ok(None) => return to_hub.closed().await,
                        Err(e) if e.code() == tonic::Code::Cancelled => return to_hub.end(status::watch_canceled()),
                        Err(e) => {
                            // A client that is gone is none of the stream's failures.
                            if std::error::Error::source(&e).is_none() {
                                broken.streams_broken[0].fetch_add(1, Ordering::Relaxed);
                            }
                            return to_hub.end(status::of_stream(e, max_request_bytes));
                        }
                    },
                    () = to_hub.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }
}
