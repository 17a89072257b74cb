//! Logs and metrics. Names of metrics are in one place; what they count is written where it happens.

mod exposition;
pub mod logs;
mod metrics;
pub mod requests;

pub use exposition::Text;
pub use metrics::{Histogram, HubNumbers, Metrics, Numbers, RpcMethod, Traffic};
