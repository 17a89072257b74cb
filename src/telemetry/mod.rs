//! Logs and metrics. Names of metrics are in one place; what they count is written where it happens.

pub mod logs;
mod metrics;
pub mod requests;

pub use metrics::{Histogram, HubNumbers, Metrics, Numbers, RpcMethod, Traffic};
