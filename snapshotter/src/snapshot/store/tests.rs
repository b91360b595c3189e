//! The store against a model: random operations must give the same results and the same errors.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// A snapshot of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Model {
    kind: Kind,
    parent: Option<String>,
    labels: Labels,
    layer: Option<u8>,
}

/// Names of the errors that an operation can have.
fn name(error: &Error) -> &'static str {
    match error {
        Error::NotFound { .. } => "not found",
        Error::ParentNotFound { .. } => "parent not found",
        Error::AlreadyExists { .. } => "exists",
        Error::TargetExists { .. } => "target exists",
        Error::ParentNotCommitted { .. } => "parent not committed",
        Error::NewParentNotCommitted { .. } => "new parent not committed",
        Error::ParentChanged { .. } => "parent changed",
        Error::NotActive { .. } => "not active",
        Error::NoMounts { .. } => "no mounts",
        Error::HasChildren { .. } => "has children",
        other => panic!("unexpected {other:?}"),
    }
}

#[derive(Debug, Clone)]
enum Op {
    Create {
        kind: Kind,
        key: String,
        parent: Option<String>,
        labels: Labels,
    },
    Remote {
        target: String,
        parent: Option<String>,
        layer: u8,
    },
    Commit {
        key: String,
        name: String,
        parent: Option<String>,
        labels: Labels,
    },
    Remove {
        key: String,
    },
    Update {
        key: String,
        labels: Labels,
        changes: Vec<LabelChange>,
    },
    Chain {
        key: String,
    },
    Reopen,
}

#[derive(Debug, Default, Clone)]
struct Models(BTreeMap<String, Model>);

impl Models {
    fn committed_parent(&self, parent: Option<&str>) -> Result<(), &'static str> {
        match parent.map(|parent| self.0.get(parent)) {
            None => Ok(()),
            Some(None) => Err("parent not found"),
            Some(Some(parent)) if parent.kind != Kind::Committed => Err("parent not committed"),
            Some(Some(_)) => Ok(()),
        }
    }

    fn target(&self, target: &str, parent: Option<&str>) -> bool {
        let fits = |model: &Model| model.kind == Kind::Committed && model.parent.as_deref() == parent;
        let numbered = |name: &str| name.strip_prefix(target).is_some_and(|rest| rest.starts_with('#'));
        match self.0.get(target) {
            None => false,
            Some(model) if fits(model) => true,
            Some(_) => self
                .0
                .iter()
                .any(|(name, model)| numbered(name) && fits(model) && model.layer.is_some()),
        }
    }

    fn commit(&mut self, key: &str, name: &str, parent: Option<&str>, labels: &Labels) -> Result<(), &'static str> {
        let old = self.0.get(key).cloned().ok_or("not found")?;
        if self.0.contains_key(name) {
            return Err("exists");
        }
        if old.kind != Kind::Active {
            return Err("not active");
        }
        let parent = match (old.parent, parent) {
            (Some(has), Some(wanted)) if has != wanted => return Err("parent changed"),
            (has, wanted) => has.or(wanted.map(str::to_owned)),
        };
        if let Some(parent) = &parent {
            match self.0.get(parent) {
                None => return Err("parent not found"),
                Some(model) if model.kind != Kind::Committed => return Err("new parent not committed"),
                Some(_) => {}
            }
        }
        self.0.remove(key);
        let model = Model {
            kind: Kind::Committed,
            parent,
            labels: without_empty(labels),
            layer: None,
        };
        self.0.insert(name.to_owned(), model);
        Ok(())
    }

    fn remove(&mut self, key: &str) -> Result<Option<u8>, &'static str> {
        let model = self.0.get(key).cloned().ok_or("not found")?;
        if self.0.values().any(|other| other.parent.as_deref() == Some(key)) {
            return Err("has children");
        }
        self.0.remove(key);
        Ok(model
            .layer
            .filter(|layer| !self.0.values().any(|other| other.layer == Some(*layer))))
    }

    fn update(&mut self, key: &str, labels: &Labels, changes: &[LabelChange]) -> Result<Labels, &'static str> {
        let model = self.0.get_mut(key).ok_or("not found")?;
        for change in changes {
            match change {
                LabelChange::All => model.labels = labels.clone(),
                LabelChange::One(name) => match labels.get(name) {
                    Some(value) => drop(model.labels.insert(name.clone(), value.clone())),
                    None => drop(model.labels.remove(name)),
                },
            }
        }
        model.labels = without_empty(&model.labels);
        Ok(model.labels.clone())
    }

    fn depth(&self, key: &str) -> Result<usize, &'static str> {
        let model = self.0.get(key).ok_or("not found")?;
        if model.kind == Kind::Committed {
            return Err("no mounts");
        }
        let mut depth = 0;
        let mut next = model.parent.as_ref();
        while let Some(parent) = next {
            depth += 1;
            next = self.0[parent].parent.as_ref();
        }
        Ok(depth)
    }
}

fn without_empty(labels: &Labels) -> Labels {
    labels
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}

fn origin(layer: u8) -> LayerOrigin {
    let digest = Digest::from_bytes([layer; 32]);
    LayerOrigin {
        toc_digest: digest,
        image: "image".to_owned(),
        layer_digest: digest,
    }
}

fn any_name() -> impl Strategy<Value = String> {
    (0..6u8).prop_map(|n| format!("n{n}"))
}

fn any_parent() -> impl Strategy<Value = Option<String>> {
    proptest::option::of(any_name())
}

fn any_labels() -> impl Strategy<Value = Labels> {
    proptest::collection::btree_map("[ab]", "[xy]?", 0..3)
}

fn any_op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![3 => Just(Kind::Active), 1 => Just(Kind::View)];
    let change = prop_oneof![Just(LabelChange::All), "[ab]".prop_map(LabelChange::One)];
    prop_oneof![
        6 => (kind, any_name(), any_parent(), any_labels())
            .prop_map(|(kind, key, parent, labels)| Op::Create { kind, key, parent, labels }),
        3 => (any_name(), any_parent(), 0..2u8)
            .prop_map(|(target, parent, layer)| Op::Remote { target, parent, layer }),
        6 => (any_name(), any_name(), any_parent(), any_labels())
            .prop_map(|(key, name, parent, labels)| Op::Commit { key, name, parent, labels }),
        4 => any_name().prop_map(|key| Op::Remove { key }),
        2 => (any_name(), any_labels(), proptest::collection::vec(change, 1..3))
            .prop_map(|(key, labels, changes)| Op::Update { key, labels, changes }),
        2 => any_name().prop_map(|key| Op::Chain { key }),
        1 => Just(Op::Reopen),
    ]
}

fn apply(store: &Store, models: &mut Models, op: &Op) {
    let wrong = |error: Error| name(&error);
    match op {
        Op::Create {
            kind,
            key,
            parent,
            labels,
        } => {
            let expected = models.committed_parent(parent.as_deref()).and_then(|()| {
                let layer = None;
                let model = Model {
                    kind: *kind,
                    parent: parent.clone(),
                    labels: without_empty(labels),
                    layer,
                };
                match models.0.contains_key(key) {
                    true => Err("exists"),
                    false => {
                        models.0.insert(key.clone(), model);
                        Ok(())
                    }
                }
            });
            let made = store.create(*kind, key, parent.as_deref(), labels, None, |_| Ok(()));
            assert_eq!(made.map(drop).map_err(wrong), expected);
        }
        Op::Remote { target, parent, layer } => {
            let labels = Labels::new();
            let made = store.create_remote(target, parent.as_deref(), &labels, &origin(*layer), |_| Ok(()));
            let expected = match models.target(target, parent.as_deref()) {
                true => Err("target exists"),
                false => models.committed_parent(parent.as_deref()),
            };
            match (made, expected) {
                (Ok(name), Ok(())) => {
                    assert_eq!(name != *target, models.0.contains_key(target));
                    assert!(!models.0.contains_key(&name) && name.starts_with(target));
                    let kind = Kind::Committed;
                    models.0.insert(
                        name,
                        Model {
                            kind,
                            parent: parent.clone(),
                            labels,
                            layer: Some(*layer),
                        },
                    );
                }
                (made, expected) => assert_eq!(made.map(drop).map_err(wrong), expected),
            }
        }
        Op::Commit {
            key,
            name,
            parent,
            labels,
        } => {
            let id = store.find(key).map_or(u64::MAX, |found| found.id);
            let usage = Usage { bytes: id, inodes: 1 };
            let committed = store.commit(id, key, name, parent.as_deref(), labels, usage);
            let succeeded = committed.is_ok();
            assert_eq!(
                committed.map_err(wrong),
                models.commit(key, name, parent.as_deref(), labels)
            );
            if succeeded {
                let found = store.find(name).unwrap();
                assert_eq!((found.id, found.usage), (id, usage));
            }
        }
        Op::Remove { key } => {
            let removed = store.remove(key).map(|removed| removed.unused_layer).map_err(wrong);
            assert_eq!(
                removed,
                models
                    .remove(key)
                    .map(|layer| layer.map(|layer| origin(layer).toc_digest))
            );
        }
        Op::Update { key, labels, changes } => {
            let updated = store
                .update(key, labels, changes)
                .map(|info| info.labels)
                .map_err(wrong);
            assert_eq!(updated, models.update(key, labels, changes));
        }
        Op::Chain { key } => {
            let chain = store.chain(key).map(|chain| chain.parents.len()).map_err(wrong);
            assert_eq!(chain, models.depth(key));
        }
        Op::Reopen => {}
    }
}

fn assert_same(store: &Store, models: &Models) {
    let mut listing = store.listing().unwrap();
    let mut listed = BTreeMap::new();
    while let Some(page) = listing.page(2).unwrap() {
        for Found { info, layer, .. } in page {
            let layer = layer.map(|origin| origin.toc_digest.as_bytes()[0]);
            assert!(info.created <= info.updated);
            let model = Model {
                kind: info.kind,
                parent: info.parent,
                labels: info.labels,
                layer,
            };
            assert!(listed.insert(info.name, model).is_none());
        }
    }
    assert_eq!(listed, models.0);
    let ids = store.with_ids(Clone::clone).unwrap();
    assert_eq!(ids.len(), models.0.len(), "every snapshot has a number of its own");
    for layer in 0..2 {
        let used = models.0.values().any(|model| model.layer == Some(layer));
        let user = store.first_user(&origin(layer).toc_digest).unwrap();
        assert_eq!(user.is_some(), used);
        assert!(user.is_none_or(|id| ids.contains(&id)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_store_behaves_as_its_model(ops in proptest::collection::vec(any_op(), 1..60)) {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("meta.redb");
        let mut store = Store::open(&path, 1).unwrap();
        let mut models = Models::default();
        for op in &ops {
            if matches!(op, Op::Reopen) {
                drop(store);
                store = Store::open(&path, 1).unwrap();
            }
            apply(&store, &mut models, op);
        }
        assert_same(&store, &models);
    }
}

#[test]
fn a_failed_directory_undoes_the_snapshot_and_its_number_is_not_used_again() {
    let place = tempfile::tempdir().unwrap();
    let store = Store::open(&place.path().join("meta.redb"), 7).unwrap();
    let labels = Labels::new();
    let mut numbers = Vec::new();
    let failed = store.create(Kind::Active, "a", None, &labels, None, |id| {
        numbers.push(id);
        Err(Error::Stopping)
    });
    assert!(matches!(failed, Err(Error::Stopping)));
    assert!(matches!(store.find("a"), Err(Error::NotFound { .. })));
    let made = store
        .create(Kind::Active, "a", None, &labels, None, |_| Ok(()))
        .unwrap();
    assert_eq!((numbers, made.id), (vec![7], 8));
}

#[test]
fn a_listing_does_not_see_later_changes() {
    let place = tempfile::tempdir().unwrap();
    let store = Store::open(&place.path().join("meta.redb"), 1).unwrap();
    for key in ["a", "b", "c"] {
        store
            .create(Kind::Active, key, None, &Labels::new(), None, |_| Ok(()))
            .unwrap();
    }
    let mut listing = store.listing().unwrap();
    assert_eq!(listing.page(1).unwrap().unwrap()[0].info.name, "a");
    store.remove("b").unwrap();
    let names: Vec<_> = listing
        .page(9)
        .unwrap()
        .unwrap()
        .into_iter()
        .map(|found| found.info.name)
        .collect();
    assert_eq!(names, ["b", "c"]);
    assert!(listing.page(9).unwrap().is_none());
}

#[test]
fn a_first_start_that_was_killed_leaves_nothing_in_the_way() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("meta.redb");
    // Killed while the file was made, and killed before the first transaction.
    std::fs::write(place.path().join("meta.redb.new"), b"redb, half").unwrap();
    drop(Store::open(&path, 1).unwrap());
    assert!(!place.path().join("meta.redb.new").exists());
    std::fs::remove_file(&path).unwrap();
    drop(Database::create(&path).unwrap());
    Store::open(&path, 1).unwrap();
}

#[test]
fn another_schema_and_foreign_files_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("meta.redb");
    drop(Store::open(&path, 1).unwrap());
    {
        let db = Database::open(&path).unwrap();
        let tx = db.begin_write().unwrap();
        tx.open_table(META).unwrap().insert("schema", 2).unwrap();
        tx.commit().unwrap();
    }
    assert!(matches!(
        Store::open(&path, 1),
        Err(StoreError::Schema { found: 2, .. })
    ));
    std::fs::write(&path, "this is not a database, whatever its name says".repeat(200)).unwrap();
    let error = Store::open(&path, 1).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    assert!(error.to_string().contains(path.to_str().unwrap()));
}

#[test]
fn a_damaged_file_is_an_error_and_never_a_panic() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("meta.redb");
    let store = Store::open(&path, 1).unwrap();
    for n in 0..40 {
        store
            .create(
                Kind::Active,
                &format!("key {n}"),
                None,
                &Labels::new(),
                None,
                |_| Ok(()),
            )
            .unwrap();
    }
    drop(store);
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 1, 9, 64, 320, 4096, 5000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        use_if_it_opens(&path);
    }
    for at in (0..whole.len()).step_by(whole.len() / 60) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        std::fs::write(&path, &damaged).unwrap();
        use_if_it_opens(&path);
    }
}

fn use_if_it_opens(path: &Path) {
    if let Ok(store) = Store::open(path, 1) {
        let _ = store.find("key 3");
        let _ = store.create(Kind::Active, "new", None, &Labels::new(), None, |_| Ok(()));
        let _ = store.remove("key 5");
        let _ = store.with_ids(|ids| ids.len());
    }
}

#[test]
fn why_a_layer_is_not_lazy_outlives_its_commit_and_the_daemon() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("meta.redb");
    let fallback = Fallback {
        host: "registry.test".to_owned(),
        ..Fallback::now("registry", "it denies access".to_owned())
    };
    let store = Store::open(&path, 0).unwrap();
    let labels = Labels::new();
    let made = store.create(Kind::Active, "a", None, &labels, Some(fallback.clone()), |_| Ok(()));
    assert_eq!(store.find("a").unwrap().fallback, Some(fallback.clone()));
    store
        .commit(made.unwrap().id, "a", "b", None, &labels, Usage::default())
        .unwrap();
    drop(store);
    let store = Store::open(&path, 0).unwrap();
    assert_eq!(store.find("b").unwrap().fallback, Some(fallback));
}

fn count(store: &Store) -> usize {
    store.with_ids(std::collections::HashSet::len).unwrap()
}

fn is_full(error: &Error) -> bool {
    matches!(error, Error::Store(error) if error.is_storage_full())
}

#[test]
fn privileged_a_full_disk_refuses_what_is_new_and_lets_the_rest_be_read_and_removed() {
    let disk = crate::layer::testing::SmallDisk::new(c"size=16m");
    let path = disk.path().join("meta.redb");
    let store = Store::open(&path, 1).unwrap();
    let long: Labels = [("label".to_owned(), "x".repeat(4000))].into();
    let create = |key: String| store.create(Kind::Active, &key, None, &long, None, |_| Ok(()));
    let mut made = 0;
    while made < 100 {
        create(format!("key {made}")).unwrap();
        made += 1;
    }
    disk.fill();
    while create(format!("key {made}")).is_ok() {
        made += 1;
    }
    for _ in 0..3 {
        let again = create("more".to_owned()).unwrap_err();
        assert!(is_full(&again), "{again:?}");
        assert_eq!(store.find("key 3").unwrap().info.labels, long);
        assert_eq!(count(&store), made);
    }
    // Those who clean up can.
    for key in 0..made {
        store.remove(&format!("key {key}")).unwrap();
    }
    disk.empty();
    for key in 0..made {
        create(format!("key {key}")).unwrap();
    }
    drop(store);
    assert_eq!(count(&Store::open(&path, 1).unwrap()), made);
}

#[test]
fn privileged_a_database_that_refuses_after_a_failed_write_is_opened_again() {
    let disk = crate::layer::testing::SmallDisk::new(c"size=64m");
    let path = disk.path().join("meta.redb");
    let store = Store::open(&path, 1).unwrap();
    let labels = Labels::new();
    let create = |key: &str| store.create(Kind::Active, key, None, &labels, None, |_| Ok(()));
    create("first").unwrap();
    let mut listing = store.listing().unwrap();
    disk.fill();
    let overfill = || {
        let tx = store.writing().unwrap();
        let much = vec![7; 2 << 20];
        let written = tx
            .open_table(SNAPSHOTS)
            .unwrap()
            .insert("much", much.as_slice())
            .is_ok();
        written && tx.commit().is_ok()
    };
    assert!(!overfill());
    let refused = store.begin_write().err();
    assert!(
        matches!(refused.as_deref(), Some(redb::Error::PreviousIo)),
        "{refused:?}"
    );
    // On the full disk too.
    store.remove("first").unwrap();
    assert!(!overfill());
    assert!(matches!(store.find("first"), Err(Error::NotFound { .. })));
    assert_eq!(count(&store), 0);
    // What was being listed meanwhile goes on or fails, and does not panic.
    let _ = listing.page(10);
    disk.empty();
    create("second").unwrap();
    drop((listing, store));
    assert_eq!(count(&Store::open(&path, 1).unwrap()), 1);
}

#[test]
fn a_database_is_not_opened_again_under_a_transaction() {
    let place = tempfile::tempdir().unwrap();
    let store = Store::open(&place.path().join("meta.redb"), 1).unwrap();
    let create = |key: &str| store.create(Kind::Active, key, None, &Labels::new(), None, |_| Ok(()));
    create("first").unwrap();
    let tx = store.writing().unwrap();
    // Closed under it, which leaves the file locked until the transaction ends.
    drop(store.db.write().unwrap().take());
    let (found, is_found) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let finding = scope.spawn(|| {
            let result = store.find("first");
            let _ = found.send(());
            result
        });
        // The other either fails at once or waits for this one; then nothing comes.
        let _ = is_found.recv_timeout(std::time::Duration::from_millis(300));
        drop(tx);
        finding.join().unwrap().unwrap();
    });
    create("second").unwrap();
    assert_eq!(count(&store), 2);
}
