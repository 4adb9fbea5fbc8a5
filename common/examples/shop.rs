//! A small web shop that never stops selling: the workload of `scripts/demo`.
//!
//! ```text
//! shop setup CONNINFO      makes the tables and fills them
//! shop work CONNINFO       places orders until it is killed
//! shop accident CONNINFO   DELETE FROM orders, without WHERE
//! shop report CONNINFO     what is in the shop
//! shop sql CONNINFO SQL    runs SQL and prints its rows
//! ```
//!
//! `accident` prints first what `report` would have printed the moment before it: it holds off new orders while it
//! counts. So the two can be compared line by line, and a restore to that moment can be proved and not only believed.

use backstay_common::postgres::{Connection, Conninfo, Mode, Row};
use backstay_common::{Error, Kind, Result};
use std::process::ExitCode;
use std::time::Duration;

/// How long the shop rests between two orders.
const PAUSE: Duration = Duration::from_millis(3);

const SETUP: &str = "
create table customers (
    id integer generated always as identity primary key, name text not null, city text not null);
create table products (
    id integer generated always as identity primary key, name text not null,
    price numeric(8, 2) not null, stock integer not null);
create table orders (
    id bigint generated always as identity primary key,
    customer_id integer not null references customers,
    placed_at timestamptz not null default clock_timestamp());
create table order_lines (
    order_id bigint not null references orders on delete cascade,
    product_id integer not null references products,
    quantity integer not null, price numeric(8, 2) not null,
    primary key (order_id, product_id));
insert into customers (name, city)
    select 'customer ' || n, 'city ' || n % 97 from generate_series(1, 20000) n;
insert into products (name, price, stock)
    select 'product ' || n, 1 + n % 500 / 3.0, 1000000 from generate_series(1, 1000) n;
insert into orders (customer_id, placed_at)
    select 1 + n % 20000, now() - (50000 - n) * interval '1 minute' from generate_series(1, 50000) n;
insert into order_lines (order_id, product_id, quantity, price)
    select o.id, 1 + (o.id * 7 + n * 331) % 1000, 1 + n, 1 + (o.id + n) % 100
    from orders o, generate_series(0, 2) n";

/// One transaction, because one simple query is: an order of three lines, and the stock that it takes.
const ORDER: &str = "
with placed as (
    insert into orders (customer_id) values (1 + floor(random() * 20000)::integer) returning id),
lines as (
    insert into order_lines (order_id, product_id, quantity, price)
    select placed.id, product.id, 1 + product.id % 3, product.price
    from placed, (select id, price from products
                  where id in (select 1 + floor(random() * 1000)::integer from generate_series(1, 3))) product
    returning product_id, quantity)
update products set stock = stock - lines.quantity from lines where products.id = lines.product_id";

const REPORT: &str = "
select (select count(*) from customers) as customers,
       (select count(*) from products) as products,
       count(*) as orders,
       (select count(*) from order_lines) as order_lines,
       (select sum(stock) from products) as stock,
       coalesce(max(id), 0) as last_order,
       coalesce(to_char(max(placed_at) at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US\"Z\"'), '-') as last_placed,
       md5(string_agg(concat(id, customer_id, placed_at at time zone 'UTC'), ',' order by id)) as fingerprint
from orders";

/// After the lock is granted every order that was placed has its commit in the WAL, and none can follow
/// until the accident has its own: this moment lies between the two, and the pause keeps it clear of both.
const BEFORE_THE_ACCIDENT: &str = "
select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') as moment";

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(run(&words)),
        Err(error) => Err(Error::new(Kind::Local, error)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shop: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}

async fn run(words: &[&str]) -> Result<()> {
    let (verb, conninfo, sql) = match *words {
        ["sql", conninfo, sql] => ("sql", conninfo, sql),
        [verb @ ("setup" | "work" | "accident" | "report"), conninfo] => (verb, conninfo, ""),
        _ => {
            let usage = "setup|work|accident|report CONNINFO, or sql CONNINFO SQL";
            return Err(Error::new(Kind::Config, format!("usage: shop {usage}")));
        }
    };
    let mut shop = Connection::connect(&Conninfo::parse(conninfo)?, Mode::Sql).await?;
    // The connection is made for an agent, which looks nowhere but in the catalog.
    shop.query("set search_path to public").await?;
    match verb {
        "setup" => shop.query(SETUP).await.map(drop),
        "work" => work(&mut shop).await,
        "accident" => accident(&mut shop).await,
        "report" => shop.query_one(REPORT).await.map(|row| print_columns(&row)),
        _ => shop.query(sql).await.map(|rows| rows.iter().for_each(print_values)),
    }
}

async fn work(shop: &mut Connection) -> Result<()> {
    loop {
        shop.query(ORDER).await?;
        tokio::time::sleep(PAUSE).await;
    }
}

async fn accident(shop: &mut Connection) -> Result<()> {
    shop.query("begin; lock table orders in exclusive mode").await?;
    print_columns(&shop.query_one(REPORT).await?);
    print_columns(&shop.query_one(BEFORE_THE_ACCIDENT).await?);
    tokio::time::sleep(Duration::from_millis(20)).await;
    shop.query("delete from orders; commit").await.map(drop)
}

fn print_columns(row: &Row) {
    for (n, column) in row.columns().iter().enumerate() {
        println!("{column:<12} {}", row.get(n).unwrap_or("-"));
    }
}

fn print_values(row: &Row) {
    let values: Vec<&str> = (0..row.columns().len()).map(|n| row.get(n).unwrap_or("")).collect();
    println!("{}", values.join(" | "));
}
