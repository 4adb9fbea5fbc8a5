//! Listings and deletion.

use super::Location;
use super::requests::PAGE;
use crate::error::{Error, Kind, Result};
use crate::name::ObjectName;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::{Error as StoreError, ObjectMeta, ObjectStore};

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Relative to the location's prefix.
    pub path: String,
    /// `None` if it is not the name of any object of ours.
    pub name: Option<ObjectName>,
    /// In bytes.
    pub size: u64,
    /// By the store's clock.
    pub modified: jiff::Timestamp,
}

impl Location {
    /// All objects below `folder` (such as `name::folder` gives; "" is everything), in the order of
    /// their paths' bytes. A folder that is not there is empty. What an unfinished write left
    /// behind is not in it.
    pub async fn list(&self, folder: &str) -> Result<Vec<Listed>> {
        self.listing(folder, None).await
    }

    /// Those of `list(folder)` whose path is greater than `after`, which begins with `folder`.
    pub async fn list_from(&self, folder: &str, after: &str) -> Result<Vec<Listed>> {
        self.listing(folder, Some(after)).await
    }

    /// The first page of `list(folder)`, and whether it is all. One request.
    pub async fn list_page(&self, folder: &str) -> Result<(Vec<Listed>, bool)> {
        self.on_disk(|disk| disk.check()).await?;
        let at = self.at(folder)?;
        let fault = |e: StoreError| self.fault("list", folder, &e);
        let page = self.0.reads.list(Some(&at)).take(PAGE);
        let found: Vec<ObjectMeta> = page.try_collect().await.map_err(fault)?;
        let is_all = found.len() < PAGE;
        Ok((found.iter().map(|meta| self.listed(meta)).collect::<Result<_>>()?, is_all))
    }

    /// Those of `list_from(folder, after)` whose path is at most `until`. Of a bucket, which lists in order, nothing
    /// is asked for beyond the page that reaches `until`.
    pub async fn list_between(
        &self,
        folder: &str,
        after: &str,
        until: Option<&str>,
    ) -> Result<Vec<Listed>> {
        if self.is_folder() {
            let mut listed = self.list_from(folder, after).await?;
            listed.retain(|object| until.is_none_or(|until| object.path.as_str() <= until));
            return Ok(listed);
        }
        let (at, offset) = (self.at(folder)?, self.at(after)?);
        let mut found = self.0.reads.list_with_offset(Some(&at), &offset);
        let mut listed = Vec::new();
        while let Some(meta) = found.next().await {
            let object = self.listed(&meta.map_err(|e| self.fault("list", folder, &e))?)?;
            if until.is_some_and(|until| object.path.as_str() > until) {
                break;
            }
            if object.path.as_str() > after {
                listed.push(object);
            }
        }
        Ok(listed)
    }

    /// The folders directly in `folder`, in order; each ends in `/`. One request for a thousand of them.
    pub async fn folders(&self, folder: &str) -> Result<Vec<String>> {
        let at = self.at(folder)?;
        let found = self.0.reads.list_with_delimiter(Some(&at)).await;
        let found = found.map_err(|e| self.fault("list", folder, &e))?;
        let mut folders: Vec<String> =
            found.common_prefixes.iter().map(|path| self.relative(path) + "/").collect();
        folders.sort_unstable();
        Ok(folders)
    }

    async fn listing(&self, folder: &str, after: Option<&str>) -> Result<Vec<Listed>> {
        let mut listed = self.raw_listing(folder, after).await?;
        // A file system, unlike a bucket, lists in no order, and some stores take the offset for a
        // hint.
        listed.retain(|object| after.is_none_or(|after| object.path.as_str() > after));
        listed.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(listed)
    }

    /// As the store gives it.
    pub(super) async fn raw_listing(
        &self,
        folder: &str,
        after: Option<&str>,
    ) -> Result<Vec<Listed>> {
        self.on_disk(|disk| disk.check()).await?;
        let at = self.at(folder)?;
        let prefix = (!at.as_ref().is_empty()).then_some(&at);
        let found = match after {
            None => self.0.reads.list(prefix),
            Some(after) => self.0.reads.list_with_offset(prefix, &self.at(after)?),
        };
        let fault = |e: StoreError| self.fault("list", folder, &e);
        let found: Vec<ObjectMeta> = found.try_collect().await.map_err(fault)?;
        found.into_iter().map(|meta| self.listed(&meta)).collect()
    }

    fn listed(&self, meta: &ObjectMeta) -> Result<Listed> {
        let path = self.relative(&meta.location);
        let time = meta.last_modified;
        let modified = jiff::Timestamp::new(time.timestamp(), time.timestamp_subsec_nanos() as i32);
        let modified = modified.map_err(|e| {
            let reason = format!("its time of modification is out of range: {e}");
            Error::new(Kind::Storage, self.say("list", &path, &reason))
        })?;
        Ok(Listed { name: path.parse().ok(), path, size: meta.size, modified })
    }

    /// Deletes all of `names`; those that are not there count as deleted. All are tried before the
    /// first fault is reported. A deletion is not synced: after a power failure a folder may hold
    /// the object again.
    pub async fn delete(&self, names: &[ObjectName]) -> Result<()> {
        let paths: Vec<String> = names.iter().map(ObjectName::to_string).collect();
        self.delete_at(&paths).await
    }

    /// `delete`, and not before all of it is durable: what is deleted afterwards can rely on it.
    pub async fn delete_durably(&self, names: &[ObjectName]) -> Result<()> {
        self.delete(names).await?;
        let files: std::collections::BTreeSet<std::path::PathBuf> = names
            .iter()
            .map(|name| Ok(format!("/{}", self.at(&name.to_string())?).into()))
            .collect::<Result<_>>()?;
        let settle = move |disk: super::disk::Disk| {
            files.iter().try_for_each(|file| disk.settle_deletion(file))
        };
        self.on_disk(settle).await.map(drop)
    }

    pub(super) async fn delete_at(&self, paths: &[String]) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        self.on_disk(|disk| disk.check()).await?;
        let at: Vec<_> = paths.iter().map(|path| self.at(path)).collect::<Result<_>>()?;
        let mut done = self.0.writes.delete_stream(stream::iter(at.into_iter().map(Ok)).boxed());
        let mut first = None;
        while let Some(result) = done.next().await {
            let error = match result {
                Ok(_) => continue,
                Err(error) => self.fault("delete", "", &error),
            };
            if error.kind() != Kind::Missing {
                first.get_or_insert(error);
            }
        }
        first.map_or(Ok(()), Err)
    }
}
