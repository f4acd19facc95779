package migrating

import (
	"context"
	"errors"

	"example.com/leader"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

func lockBefore(ctx context.Context, client *clientv3.Client, report string) (done bool, err error) {
	session, err := concurrency.NewSession(client)
	if err != nil {
		return false, err
	}
	defer session.Close()
	mutex := concurrency.NewMutex(session, "svc/report")
	if err := mutex.Lock(ctx); err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, mutex.Unlock(context.WithoutCancel(ctx))) }()
	resp, err := client.Txn(ctx).
		If(mutex.IsOwner()).
		Then(clientv3.OpPut("report", report)).
		Commit()
	return err == nil && resp.Succeeded, err
}

func lockAfter(ctx context.Context, client *clientv3.Client, report string) (done bool, err error) {
	l, err := leader.Campaign(ctx, client, "svc/report", "")
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, l.Resign(context.WithoutCancel(ctx))) }()
	resp, err := client.Txn(l.Context()).
		If(l.Guard()).
		Then(clientv3.OpPut("report", report)).
		Commit()
	return err == nil && resp.Succeeded, err
}
