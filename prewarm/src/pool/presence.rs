//! Noticing at once that containerd is gone: a subscription to events that never come ends with its connection.

use std::sync::Arc;
use std::time::Duration;

use hullspeed_proto::containerd::services::events::v1::SubscribeRequest;

use super::snapshot::Off;
use super::state::Shared;

/// No event has this topic.
const NO_TOPIC: &str = r#"topic=="/hullspeed/none""#;

/// Between subscriptions, also to a containerd that refuses them.
const PAUSE: Duration = Duration::from_secs(1);

/// Until it is dropped.
pub(super) async fn follow(shared: Arc<Shared>) {
    let mut facts = shared.facts.subscribe();
    while facts.wait_for(Option::is_some).await.is_ok() {
        let request = SubscribeRequest {
            filters: vec![NO_TOPIC.into()],
        };
        // One that cannot be had says nothing; the next survey does.
        if let Ok(answer) = shared.containerd.events().subscribe(request).await {
            let mut events = answer.into_inner();
            while matches!(events.message().await, Ok(Some(_))) {}
            shared.lose("containerd has closed the connection");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

impl Shared {
    /// containerd is away until a survey has shown that it is there.
    pub(super) fn lose(&self, detail: impl Into<String>) {
        self.state().away = Some(Off::new("containerd_away", detail));
        // Whoever adopts stops, and learns anew when it is back.
        self.facts.send_if_modified(|known| known.take().is_some());
        self.wake.notify_one();
    }
}
