//! The ways to a blob: redirects to signed addresses that expire, tokens that expire.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use hullspeed_tests::content::ContentFile;
use hullspeed_tests::lazy::{Published, Source, check_all};
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::proxy::record::{RequestRecord, sent_again};
use hullspeed_tests::proxy::signed::{Redirects, Signer};
use hullspeed_tests::proxy::tokens::TOKEN_PATH;
use hullspeed_tests::scenario::Scenario;

/// Nothing is fetched but for readers.
const DEMAND_ONLY: &str = "[fetch]\nprefetch = false\nbackground = false\n";

/// Longer than any of these tests.
const LONG: Duration = Duration::from_secs(600);

fn files() -> Vec<ContentFile> {
    (0..4)
        .map(|number| ContentFile::new(format!("file-{number}"), 2 << 20))
        .collect()
}

async fn source() -> (Source, Published) {
    let source = Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap();
    let image = source.publish("image", &[files()], &[]).unwrap();
    (source, image)
}

fn served(records: &[RequestRecord], status: u16) -> usize {
    records.iter().filter(|record| record.status == status).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn signed_addresses_are_found_again_and_see_no_login() {
    let (source, image) = source().await;
    let store = source.mirror(LinkOptions::default()).await.unwrap();
    let signer = Signer::new(LONG);
    store.require_signature(signer.clone());
    source.proxy.require_tokens(LONG);
    source.proxy.redirect_blobs(Redirects {
        to: store.address(),
        hops: 3,
        signer: signer.clone(),
    });
    let mut node = source.node("redirects", DEMAND_ONLY).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.view(&image, "view").await.unwrap();
    let all = files();
    // The mount's own request ends within a member, which comes whole with the first read of it.
    let mounted = store.requests();
    store.reset();
    check_all(view.path(), &all[..1]).await.unwrap();
    signer.expire_all();
    check_all(view.path(), &all[1..]).await.unwrap();
    let records = store.requests();
    assert!(served(&records, 206) >= 2, "{records:#?}");
    assert!(served(&records, 307) >= 2, "{records:#?}");
    assert!(served(&records, 403) >= 1, "no address had expired: {records:#?}");
    assert!(
        !records.iter().any(|record| record.authorized),
        "a login went to another host: {records:#?}"
    );
    assert!(!mounted.iter().any(|record| record.authorized), "{mounted:#?}");
    assert_eq!(sent_again(&records), 0, "{records:#?}");
    // Nothing of the blob came from the registry itself, to which the login went.
    let own = source.proxy.requests();
    assert!(!own.iter().any(RequestRecord::is_served), "{own:#?}");
    assert!(own.iter().any(|record| record.authorized && record.status == 307));
    node.snapshots.remove(view).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_no_good_any_more_is_replaced() {
    let (source, image) = source().await;
    source.proxy.require_tokens(LONG);
    let mut node = source.node("tokens", DEMAND_ONLY).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.view(&image, "view").await.unwrap();
    let all = files();
    check_all(view.path(), &all[..1]).await.unwrap();
    let tokens = |records: &[RequestRecord]| {
        let asked = records.iter().filter(|record| record.path.starts_with(TOKEN_PATH));
        asked.count()
    };
    assert!(tokens(&source.proxy.requests()) >= 1);
    source.proxy.reset();
    source.proxy.revoke_tokens();
    check_all(view.path(), &all[1..]).await.unwrap();
    let records = source.proxy.requests();
    assert!(tokens(&records) >= 1 && served(&records, 401) >= 1, "{records:#?}");
    assert_eq!(sent_again(&records), 0, "{records:#?}");
    node.snapshots.remove(view).await.unwrap();
}
