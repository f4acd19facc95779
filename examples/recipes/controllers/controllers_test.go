package controllers_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"

	"example.com/leader/examples/recipes/controllers"
	"example.com/leader/examples/recipes/internal/recipetest"
	"example.com/leader/internal/etcdtest"
	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"
)

const election = "shop/controllers"

func TestNextLeaderReconcilesOnlyAfterTheFormerLeaderHasStopped(t *testing.T) {
	t.Parallel()
	client := etcdtest.NewClient(t, etcdtest.Start(t).Endpoint)
	// A manager asks the API only for what its controllers watch, and this one watches nothing there.
	api := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { t.Error(r.URL) }))
	defer api.Close()
	events := make(chan string, 100)
	start := func(name string) {
		reconciler := reconcile.Func(func(ctx context.Context, r reconcile.Request) (reconcile.Result, error) {
			events <- name + " reconciles " + r.Name
			<-ctx.Done()
			events <- name + " stops"
			return reconcile.Result{}, ctx.Err()
		})
		setup := func(m manager.Manager) error {
			c, err := controller.New("orders", m, controller.Options{Reconciler: reconciler})
			if err != nil {
				return err
			}
			return c.Watch(source.Func(func(_ context.Context, q workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
				q.Add(reconcile.Request{NamespacedName: types.NamespacedName{Name: "order"}})
				return nil
			}))
		}
		options := manager.Options{Logger: logr.Discard()}
		recipetest.Go(t, func(ctx context.Context) error {
			return controllers.Run(ctx, client, election, name, &rest.Config{Host: api.URL}, options, setup)
		})
	}
	start("a")
	recipetest.Expect(t, events, "a reconciles order")
	start("b")
	recipetest.Transfer(t, client, election)
	recipetest.Expect(t, events, "a stops", "b reconciles order")
	recipetest.Transfer(t, client, election)
	recipetest.Expect(t, events, "b stops", "a reconciles order") // by its second manager
}
