//! Requests, counted by kind: what a store charges for.
//!
//! Counted where they leave for the store, so whatever a caller does beside what it was asked for is in it: reading back,
//! probing, the pages of a listing, the batches of a deletion. What is not: the store client's own retries of a read,
//! and what it asks of others to be let in.

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Stores answer a listing with so many names at once, and take so many in a deletion.
pub(super) const PAGE: usize = 1000;

/// How many requests of each kind a location has had from this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    pub put: u64,
    pub get: u64,
    pub head: u64,
    pub list: u64,
    pub delete: u64,
}

/// The running count. Shared by the stores that a location reads and writes with.
#[derive(Debug, Default)]
pub(super) struct Counter {
    put: AtomicU64,
    get: AtomicU64,
    head: AtomicU64,
    list: AtomicU64,
    delete: AtomicU64,
}

impl Counter {
    pub(super) fn now(&self) -> Requests {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Requests {
            put: read(&self.put),
            get: read(&self.get),
            head: read(&self.head),
            list: read(&self.list),
            delete: read(&self.delete),
        }
    }
}

fn count(kind: &AtomicU64) {
    kind.fetch_add(1, Ordering::Relaxed);
}

/// A store whose requests are counted.
#[derive(Debug)]
pub(super) struct Counted {
    store: Arc<dyn ObjectStore>,
    counter: Arc<Counter>,
}

impl Counted {
    pub(super) fn wrap(
        store: Arc<dyn ObjectStore>,
        counter: &Arc<Counter>,
    ) -> Arc<dyn ObjectStore> {
        Arc::new(Counted { store, counter: counter.clone() })
    }

    /// The first of each page that is taken from a listing is a request; so is an empty listing.
    fn pages(
        &self,
        listed: BoxStream<'static, Result<ObjectMeta>>,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let counter = self.counter.clone();
        count(&counter.list);
        listed
            .enumerate()
            .map(move |(number, object)| {
                if number > 0 && number % PAGE == 0 {
                    count(&counter.list);
                }
                object
            })
            .boxed()
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Counted {
    async fn put_opts(
        &self,
        at: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        count(&self.counter.put);
        self.store.put_opts(at, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        count(&self.counter.put);
        self.store.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        count(if options.head { &self.counter.head } else { &self.counter.get });
        self.store.get_opts(at, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let counter = self.counter.clone();
        let paths = paths.enumerate().map(move |(number, path)| {
            if number % PAGE == 0 {
                count(&counter.delete);
            }
            path
        });
        self.store.delete_stream(paths.boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.pages(self.store.list(prefix))
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.pages(self.store.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let result = self.store.list_with_delimiter(prefix).await?;
        let shown = result.common_prefixes.len() + result.objects.len();
        self.counter.list.fetch_add(1 + (shown / PAGE) as u64, Ordering::Relaxed);
        Ok(result)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        count(&self.counter.put);
        self.store.copy_opts(from, to, options).await
    }
}
